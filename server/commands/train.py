"""Owns the command `perft train`: its flags, made from the options' model, and the way from there onto a server.

Invariant: exit 0 means the adapter is written (and pushed, if asked), 1 that it is not, with the reason on stderr, 2
wrong usage, 130 interrupted: the same command goes on where it stopped.
"""

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from adapters.names import NAME_RULE, is_name
from perft.training.options import TrainOptions, read_options
from server.commands.report import reported

HEADLINE = (
    "Train a PERFT adapter on a data file and write it as a folder that a server takes. A training that was "
    "interrupted goes on with the same command. Several GPUs: accelerate launch $(which perft) train ..."
)


def run(arguments: list[str]) -> int:
    """Run `perft train ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch: threads that spin make a busy machine crawl
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    push, server, activate, file = (given.pop(name) for name in ("push", "server", "activate", "config"))
    if push is not None and not is_name(push):
        parser.error(f"--push: found the name {push!r}, expected {NAME_RULE}")
    if push is None and server is not None:
        parser.error("--server: it belongs to --push NAME")
    if server is not None:
        from server.client.arguments import server_url

        try:
            server_url(server)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--server: {error}")
    if activate and push is None:
        parser.error("--activate: it belongs to --push NAME")
    made: list[TrainOptions] = []

    def work() -> None:
        options = read_options(given, file)
        if _train(options):
            made.append(options)

    status = reported("perft train", work, "interrupted; the same command goes on from the last checkpoint")
    if status or push is None or not made:
        return status
    from server.client.commands import run as run_adapters

    target = [] if server is None else ["--server", server]
    status = run_adapters([*target, "push", push, str(made[0].output), *([] if activate else ["--no-activate"])])
    if status:
        print(
            f"perft train: the adapter is written; to upload it: perft adapters push {push} {made[0].output}",
            file=sys.stderr,
        )
    return status


def _train(options: TrainOptions) -> bool:
    """Whether this process is the one of several that wrote the adapter."""
    from perft.training.run import train

    result = train(options)
    if result.is_main:
        card = result.output / "README.md"
        print(f"{result.output}: {result.steps} steps in {result.seconds:.0f} s; the card is {card}")
    return result.is_main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="perft train", description=HEADLINE, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="options as YAML or JSON; flags win")
    for name, field in TrainOptions.model_fields.items():
        flag, help = f"--{name.replace('_', '-')}", str(field.description)
        if not field.is_required() and field.default not in (None, ()) and "default" not in help:
            help += f" (default: {field.default})"
        parser.add_argument(flag, help=help.replace("%", "%%"), **_argument(field.annotation))
    pushing = parser.add_argument_group("onto a server")
    pushing.add_argument("--push", default=None, metavar="NAME", help="upload the adapter as the next version of NAME")
    pushing.add_argument("--server", default=None, metavar="URL", help="default: PERFT_SERVER, or 127.0.0.1:8000")
    pushing.add_argument("--activate", action="store_true", default=False, help="make that version the active one")
    return parser


def _argument(annotation: Any) -> dict[str, Any]:
    """How argparse reads an option of this type; its bounds are the model's."""
    kinds = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is types.UnionType or type(None) in get_args(annotation):
        return _argument(kinds[0])
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is Literal:
        return {"choices": list(get_args(annotation))}
    if get_origin(annotation) is tuple:
        return {"nargs": "+", "metavar": "FILE" if kinds[0] is Path else "N"}
    if hasattr(annotation, "__metadata__"):
        return _argument(kinds[0])
    return {"metavar": {int: "N", float: "X", Path: "FOLDER"}.get(annotation, "TEXT")}
