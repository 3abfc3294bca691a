"""Owns `perft serve`: reject early what must be rejected, then hand over to vLLM's own server."""

import errno
import os
import traceback
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from server.errors import ServerDiedError, StartError, StartFailedError
from server.hosting.environment import limit_sequences, load_plugins, prepare_environment
from server.hosting.run import Run

if TYPE_CHECKING:
    from perft.base_model import BaseShape

NO_MODEL = "found no model to serve: perft serve MODEL [--adapter NAME=PATH ...]"
FLAGS_WITHOUT_MODEL = ("-h", "-v", "--help", "--version", "--model", "--config")
"""With one of these, or its beginning, a command line needs no positional model."""
VALUED_FLAGS = ("--adapter", "--adapter-store", "--pool-rows", "--api-key", "--admin-key", "--host", "--port")
"""Flags whose next word is never the model; the ones that a forgotten model is likely to leave behind."""


def serve(argv: list[str]) -> NoReturn:
    """Run the server until it is stopped. Raises StartError if it must not start, ServerDiedError if it ends by itself.

    torch and vLLM take seconds to import, so they come after the checks that need neither.
    """
    if not may_name_model(argv):
        raise StartError(NO_MODEL)
    args = prepare(argv)

    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    args.perft_run = Run()
    run(args)
    raise SystemExit(0)


def prepare(argv: list[str]) -> Namespace:
    """The arguments of vLLM's server, with our settings as `perft_settings`, from those of `perft serve`; the process's
    environment is set to fit. Raises StartError for whatever can be refused before a model is loaded."""
    prepare_environment()
    load_plugins()

    from server.app.arguments import base_names, parse_arguments, prepare_arguments
    from server.app.given_adapters import check_folders, parse_named_folders

    args = parse_arguments(argv)
    prepare_arguments(args)
    limit_sequences(args.perft_settings.max_sequences)
    check_model(args.model)
    check_store(args.perft_settings.adapter_store)
    folders = parse_named_folders(args.adapter or [], base_names(args))
    check_folders(folders, known_base(args), args.perft_settings.adapter_limits)
    return args


def check_model(model: str) -> None:
    """Raises StartError for a folder that does not exist: vLLM would take its path for the name of a repository."""
    is_path = model.startswith(("/", "./", "../", "~"))
    if is_path and not os.path.exists(model):
        raise StartError(f"found nothing at {model}, expected the folder of a model")


def check_store(place: Path | str) -> None:
    """Raises StartError for a store that cannot be opened, before a model is loaded."""
    from adapters.errors import StoreError
    from adapters.store.address import objects_at
    from adapters.store.folder.lock import FolderLock

    try:
        if isinstance(place, str):
            next(iter(objects_at(place).list("STORE.json")), None)
        elif (place / "lock").exists():
            FolderLock(place / "lock").release()
    except (StoreError, OSError) as error:
        raise StartError(f"--adapter-store: {error}") from error


def may_name_model(argv: list[str]) -> bool:
    """Whether these arguments may name a model, or ask for help instead. Only a clear no is False.

    Without vLLM's parser a word may be the model or the value of a flag not listed in VALUED_FLAGS.
    """
    for before, word in pairwise(["", *argv]):
        flag = word.partition("=")[0]
        if word.startswith("-") and any(wanted.startswith(flag) for wanted in FLAGS_WITHOUT_MODEL):
            return True
        if not word.startswith("-") and before not in VALUED_FLAGS:
            return True
    return False


def known_base(args: Namespace) -> "BaseShape | None":
    """The base's shape from its config alone, before anything is loaded; None where it cannot be known yet.

    Adapters are checked again once the engine runs: it knows the dtype and every architecture.
    """
    import torch
    from transformers import AutoConfig

    from perft.base_model import base_of_config

    if args.hf_overrides or args.hf_config_path:
        return None
    try:
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    except (OSError, ValueError):
        return None
    return base_of_config(config, torch.float32)


def run(args: Namespace) -> None:
    """vLLM's own server. Raises StartError for a port that is taken and for whatever init_state refuses, and
    ServerDiedError for an end after the start that nobody asked for."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    from server.app.connections import loop_factory, uvicorn_arguments

    settings, ended = args.perft_settings, args.perft_run
    try:
        uvloop.run(run_server(args, **uvicorn_arguments(settings)), loop_factory=loop_factory(settings))
    except (Exception, KeyboardInterrupt) as error:
        if ended.death is None:
            _explain(error, ended, args)
    if ended.death is not None:
        raise ServerDiedError(ended.death)


def _explain(error: BaseException, ended: Run, args: Namespace) -> NoReturn:
    """Raise what says best why vLLM's server ended with `error`."""
    if isinstance(error, KeyboardInterrupt):
        raise SystemExit(0) from None
    if isinstance(error, StartError):
        raise error
    if ended.has_started:
        traceback.print_exception(error)
        raise ServerDiedError(f"{type(error).__name__}: {error}") from error
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        raise StartError(
            f"port {args.port} of {args.host} is taken: stop what listens there, or choose another with --port"
        ) from error
    if isinstance(error, RuntimeError):
        raise StartFailedError(f"vLLM ended: {error} (the first ERROR above says why)") from error
    if isinstance(error, Exception):
        traceback.print_exception(error)
        first_line = str(error).partition("\n")[0]
        raise StartFailedError(f"vLLM ended: {type(error).__name__}: {first_line}") from error
    raise error
