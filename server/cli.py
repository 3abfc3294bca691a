"""Owns the command `perft`."""

import sys
from importlib.metadata import version

from server.errors import StartError

USAGE = """usage: perft serve MODEL [--adapter NAME=PATH ...] [any flag of `vllm serve`]
       perft adapters {list,show,push,activate,rm,verify,pin,unpin,allow} ...
       perft --version

`perft serve --help=PERFT` lists our flags, `perft serve --help=all` every one; `perft adapters --help` its commands."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script. Exits with 0 (ended as asked), 1 (refused) or 2 (wrong usage)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"perft-server {version('perft-server')}")
        return
    if arguments[:1] == ["adapters"]:
        from server.client.commands import run

        raise SystemExit(run(arguments[1:]))
    if not arguments or arguments[0] != "serve":
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    from server.app.serve import serve

    try:
        serve(arguments[1:])
    except StartError as error:
        print(f"perft: refused to start:\n{error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
