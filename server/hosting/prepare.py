"""Owns what is done and refused before an engine starts, whoever hosts the server.

torch and vLLM take seconds to import, so they are imported where they are needed.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.access import explained
from server.errors import StartError
from server.hosting.environment import limit_sequences, load_plugins, prepare_environment

if TYPE_CHECKING:
    from perft.base_model import BaseShape


def prepare(argv: Sequence[str]) -> Namespace:
    """The arguments of vLLM's server, with our settings as `perft_settings`, from those of `perft serve`; the process's
    environment is set to fit. Raises StartError for whatever can be refused before a model is loaded."""
    prepare_environment()
    load_plugins()

    from server.hosting.arguments import base_names, parse_arguments, prepare_arguments
    from server.hosting.given import check_folders, parse_named_folders
    from server.settings.paths import check_paths

    try:
        args = parse_arguments(argv)
        prepare_arguments(args)
        limit_sequences(args.perft_settings.max_sequences)
        check_paths(args.model, args.perft_settings)
        folders = parse_named_folders(args.adapter or [], base_names(args))
        check_folders(folders, known_base(args), args.perft_settings.adapter_limits)
    except PermissionError as error:
        raise StartError(explained(error)) from error
    return args


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
