"""Owns `perft serve`: reject early what must be rejected, then hand over to vLLM's own server."""

import errno
import traceback
from argparse import Namespace
from itertools import pairwise
from typing import Any, NoReturn

from adapters.access import explained
from server.errors import ServerDiedError, StartError, StartFailedError
from server.hosting.prepare import prepare
from server.hosting.run import Run
from server.hosting.starting import end_on_signals

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
    end_on_signals()
    args = prepare(argv)

    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    args.perft_run = Run()
    run(args)
    raise SystemExit(0)


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


def run(args: Namespace) -> None:
    """vLLM's own server. Raises StartError for a port that is taken and for whatever init_state refuses, and
    ServerDiedError for an end after the start that nobody asked for."""
    import uvloop

    from server.app.connections import loop_factory, uvicorn_arguments

    settings, ended = args.perft_settings, args.perft_run
    try:
        uvloop.run(serve_vllm(args, **uvicorn_arguments(settings)), loop_factory=loop_factory(settings))
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if ended.death is None:
            _explain(error, ended, args)
    if ended.death is not None:
        raise ServerDiedError(ended.death)


async def serve_vllm(args: Namespace, **uvicorn_options: Any) -> None:
    """vLLM's `run_server` from its two halves: whole, it would handle SIGTERM in place of `end_on_signals`."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.system_utils import decorate_logs

    decorate_logs("APIServer", skip_if_decorated=True)
    address, sock = setup_server(args, reuse_port=False)
    await run_server_worker(address, sock, args, **uvicorn_options)


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
    if isinstance(error, PermissionError):
        raise StartFailedError(f"vLLM ended: {explained(error)}") from error
    if isinstance(error, RuntimeError):
        raise StartFailedError(f"vLLM ended: {error} (the first ERROR above says why)") from error
    if isinstance(error, Exception):
        traceback.print_exception(error)
        first_line = str(error).partition("\n")[0]
        raise StartFailedError(f"vLLM ended: {type(error).__name__}: {first_line}") from error
    raise error
