"""Owns the commands `perft import` and `perft export`.

Invariant: exit 0 means the folder is written whole, 1 that nothing was (the reason is on stderr), 2 wrong usage.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.reading import printable
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
    from perft.convert.routers import fingerprint_in
    from perft.hf.base import renormalizes
    from perft.hf.files import write_folder

    _check_new(given.output)
    checkpoint = read_checkpoint(given.checkpoint)
    base, shape = _base(given.base)
    values = Given(
        base_name=given.base,
        model_type=base.model_type,
        renormalizes=renormalizes(base),
        alpha=given.alpha,
        top_k=given.top_k,
        gate_weight=given.gate_weight,
        description=given.description,
    )
    config, tensors = converted(checkpoint, shape, values)
    fingerprint = fingerprint_in(given.base, shape)
    if fingerprint is None:
        print(f"perft import: note: the weights of {given.base} are not here: no base_fingerprint", file=sys.stderr)
    with _made_whole(given.output) as folder:
        write_folder(folder, config.model_copy(update={"base_fingerprint": fingerprint}), tensors)
    weighted = f", gate_weight {config.gate_weight}" if config.is_routed else ""
    experts = f"{config.expert_type} expert{'s' if config.num_experts > 1 else ''}"
    print(f"{given.output}: PERFT-{config.variant}, {config.num_experts} {experts}{weighted}")


def _export(given: argparse.Namespace) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from torch import float32

    from adapters.errors import InvalidAdapterError
    from adapters.format.folder import read_folder
    from perft.convert.exporting import exported
    from perft.hf.base import renormalizes

    _check_new(given.output)
    base, shape = _base(given.base)
    try:
        checked = read_folder(given.adapter, shape)
    except InvalidAdapterError as error:
        raise InputError(f"{given.adapter} is no adapter for {given.base}", list(error.violations)) from None
    layers = checked.layer_weights(replace(shape, dtype=float32))  # not rounded to the type that the base is served in
    config, tensors = exported(checked.config, layers, base.model_type, shape.moe_layers, renormalizes(base))
    with _made_whole(given.output) as folder:
        weights = folder / "model.safetensors"
        try:
            save_file(tensors, weights)
        except SafetensorError as error:  # in which safetensors wraps what the system said, such as a full disk
            raise InputError(f"cannot write {given.output}: {error}") from None
        weights.chmod(0o644)  # safetensors makes it readable only by its owner
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{given.output}: {len(tensors)} tensors for {config['model_type']}")


def _base(name: str) -> tuple[Any, Any]:
    """The base's configuration and shape. Raises InputError."""
    from perft.hf.base import load_config, shape_on_meta

    try:
        config = load_config(name)
        return config, shape_on_meta(config)
    except (InputError, OSError):
        raise
    except Exception as error:  # transformers judges a config.json by errors of its own, with no class in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the base {name} cannot be read: {printable(reason)[:300]}") from None


def _check_new(output: Path) -> None:
    """Raises InputError for what is there already, other than an empty folder."""
    if output.is_symlink() and not output.exists():
        raise InputError(f"{output} is a link to nothing ({os.readlink(output)}): remove it, or name another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already, expected a folder to be made")


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, whose files become those of `output` at the end; after a failure nothing is left.

    An empty folder that is there stays the same one (it may be a mount); config files are put into it last.
    """
    is_there = output.is_dir()
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    moved: list[Path] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".perft-", dir=output if is_there else output.parent) as unfinished:
            folder = Path(unfinished) / "folder"
            folder.mkdir()
            yield folder
            if not is_there:
                os.rename(folder, output)
                return
            for file in sorted(folder.iterdir(), key=lambda file: file.suffix == ".json"):
                moved.append(output / file.name)
                os.rename(file, moved[-1])
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


Command = Callable[[list[str]], int]
COMMANDS: dict[str, Command] = {"import": run_import, "export": run_export}
