"""Owns the command `perft`. The console script starts in perft/command.py, which checks that this module is ours."""

import sys
from importlib import import_module
from importlib.metadata import version

from server.errors import ServerDiedError, StartError

USAGE = """usage: perft serve MODEL [--adapter NAME=PATH ...] [any flag of `vllm serve`]
       perft adapters {list,show,push,activate,rm,verify,pin,unpin,allow} ...
       perft top
       perft chat --model NAME [--model NAME ...] [PROMPT]
       perft store {migrate,verify,sweep,timing} ...
       perft train --base MODEL --data FILE --output FOLDER [--push NAME] ...
       perft import CHECKPOINT --base MODEL --output FOLDER
       perft export FOLDER --base MODEL --output CHECKPOINT
       perft inspect FOLDER [--prompts FILE] [--plot OUT.png]
       perft ray up CONFIG
       perft eval FILE --model NAME [--model NAME ...]
       perft --version

`perft serve --help=PERFT` lists PERFT's own flags, `perft serve --help=all` vLLM's as well.
`perft adapters --help` lists the commands that manage the adapters of a running server."""

COMMANDS = {
    "adapters": ("server.client.commands", "run"),
    "top": ("server.client.live.top", "run"),
    "chat": ("server.client.chat.command", "run"),
    "store": ("server.commands.store", "run"),
    "train": ("server.commands.train", "run"),
    "import": ("server.commands.convert", "run_import"),
    "export": ("server.commands.convert", "run_export"),
    "inspect": ("server.commands.inspect", "run"),
    "ray": ("server.commands.ray", "run"),
    "eval": ("server.commands.evaluate", "run"),
}
"""Command -> the module and the function that run it, imported when it is asked for: each needs other libraries."""


def main(argv: list[str] | None = None) -> None:
    """Run a command line. Exits with 0 (stopped as asked), 1 (did not start, or a client's command failed), 2 (wrong
    usage) or 70 (a server that had started ended by itself)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"perft-server {version('perft-server')}")
        return
    if arguments and arguments[0] in COMMANDS:
        module, function = COMMANDS[arguments[0]]
        raise SystemExit(getattr(import_module(module), function)(arguments[1:]))
    if not arguments or arguments[0] != "serve":
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    from server.app.serve import serve
    from server.hosting.run import EXIT_DIED

    try:
        serve(arguments[1:])
    except StartError as error:
        print(f"perft: {error.headline}:\n{error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except ServerDiedError as error:
        print(f"perft: the server ended by itself: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_DIED) from error


if __name__ == "__main__":
    from perft import command

    command.main()
