"""Owns `perft serve`: refuse early what must be refused, then hand over to vLLM's own server."""

import errno
import os
from argparse import Namespace
from importlib.metadata import entry_points
from typing import NoReturn

import torch

from perft.base_model import BaseShape, base_of_config
from perft.engine.plugin import KILL_SWITCH, is_switched_off
from server.errors import StartError

PLUGINS = {"vllm.general_plugins": "perft", "vllm.endpoint_plugins": "perft_server"}


def serve(argv: list[str]) -> NoReturn:
    """Run the server until it is told to stop. Raises StartError if it must not start."""
    prepare_environment()
    load_plugins()

    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args

    from server.app.arguments import base_names, parse_arguments, prepare_arguments
    from server.app.services import limits_of
    from server.app.startup import check_folders, parse_named_folders

    args = parse_arguments(argv)
    prepare_arguments(args)
    folders = parse_named_folders(args.adapter or [], base_names(args))
    check_folders(folders, known_base(args), limits_of(args.perft_settings))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    run(args)
    raise SystemExit(0)


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
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # what server and scheduler end a request by


def load_plugins() -> None:
    """Do what vLLM will do, and fail where vLLM would only log and serve without us. Raises StartError."""
    for group, name in PLUGINS.items():
        found = [point for point in entry_points(group=group) if point.name == name]
        if not found:
            raise StartError(f"perft-server is not installed as a package (no {group} named {name}): pip install it")
        try:
            found[0].load()()
        except Exception as error:
            raise StartError(f"PERFT's plugin {found[0].value} cannot take its place in vLLM: {error}") from error


def known_base(args: Namespace) -> BaseShape | None:
    """The base's shape from its config alone, before anything is loaded; None where it cannot be known yet.

    The engine's own word is checked against again once it runs: it knows the dtype and every architecture.
    """
    from transformers import AutoConfig

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
