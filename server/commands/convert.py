"""Owns the commands `perft import` and `perft export`.

Invariant: exit 0 means the folder is written whole, 1 that nothing was (the reason is on stderr), 2 wrong usage.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from perft.errors import InputError
from server.commands.report import reported


def run_import(arguments: list[str]) -> int:
    """Run `perft import ARGUMENTS` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="perft import",
        description="Turn a checkpoint of the PERFT paper's code (OLMoE, Mixtral) into an adapter that a server takes.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, or its .safetensors file")
    _add_base(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the adapter's folder, to be made")
    parser.add_argument("--alpha", type=float, metavar="X", help="lora_alpha, where the checkpoint does not say it")
    parser.add_argument("--top-k", type=int, metavar="N", help="experts of a token, where the checkpoint does not say")
    parser.add_argument(
        "--gate-weight",
        choices=["adapter", "base_slot"],
        help="how R's experts are weighted (default: base_slot for OLMoE, as the published code does, else adapter)",
    )
    parser.add_argument("--description", metavar="TEXT", help="what the adapter is for")
    given = parser.parse_args(arguments)
    return reported("perft import", lambda: _import(given))


def run_export(arguments: list[str]) -> int:
    """Run `perft export ARGUMENTS` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="perft export", description="Turn an adapter's folder into a checkpoint for the PERFT paper's code."
    )
    parser.add_argument("adapter", type=Path, metavar="FOLDER", help="the adapter's folder")
    _add_base(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the checkpoint's, to be made")
    given = parser.parse_args(arguments)
    return reported("perft export", lambda: _export(given))


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, metavar="MODEL", help="the base it was trained on: a folder, or a name"
    )


def _import(given: argparse.Namespace) -> None:
    from perft.convert.checkpoint import read_checkpoint
    from perft.convert.importing import Given, converted
    from perft.hf.base import fingerprint_of, load_config, renormalizes, shape_on_meta
    from perft.hf.files import write_folder

    _check_new(given.output)
    checkpoint = read_checkpoint(given.checkpoint)
    base = load_config(given.base)
    shape = shape_on_meta(base)
    config, tensors = converted(
        checkpoint,
        shape,
        Given(
            base_name=given.base,
            model_type=base.model_type,
            renormalizes=renormalizes(base),
            fingerprint=fingerprint_of(given.base, shape),
            alpha=given.alpha,
            top_k=given.top_k,
            gate_weight=given.gate_weight,
            description=given.description,
        ),
    )
    write_folder(given.output, config, tensors)
    weighted = f", gate_weight {config.gate_weight}" if config.is_routed else ""
    print(f"{given.output}: PERFT-{config.variant}, {config.num_experts} {config.expert_type} experts{weighted}")


def _export(given: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from adapters.errors import InvalidAdapterError
    from adapters.format.folder import read_folder
    from perft.convert.exporting import exported
    from perft.hf.base import load_config, shape_on_meta

    _check_new(given.output)
    base = load_config(given.base)
    shape = shape_on_meta(base)
    try:
        checked = read_folder(given.adapter, shape)
    except InvalidAdapterError as error:
        raise InputError(f"{given.adapter} is no adapter for {given.base}", list(error.violations)) from None
    config, tensors = exported(checked.config, checked.layer_weights(shape), base.model_type, shape.moe_layers)
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".perft-", dir=given.output) as unfinished:
        weights = Path(unfinished) / "model.safetensors"
        save_file(tensors, weights)
        weights.chmod(0o644)
        (given.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(weights, given.output / "model.safetensors")
    print(f"{given.output}: {len(tensors)} tensors for {config['model_type']}")


def _check_new(output: Path) -> None:
    """Raises InputError for a folder that has something in it already."""

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already, expected a folder to be made")


Command = Callable[[list[str]], int]
COMMANDS: dict[str, Command] = {"import": run_import, "export": run_export}
