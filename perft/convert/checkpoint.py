"""Owns reading a checkpoint of the authors: its config.json, and the tensors of its safetensors files, by place.

Invariant: every tensor has a place, or the checkpoint is refused with the names of those that have none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from perft.convert.layout import Place, parsed
from perft.convert.mistakes import PICKLES, mistake, pickles_of
from perft.errors import InputError

CONFIGS = ("config.json", "adapter_config.json")
SAVE = "safetensors.torch.save_file, on a machine where you trust it"


@dataclass(frozen=True)
class Checkpoint:
    """config: its config.json, or adapter_config.json, or {}. tensors: by place."""

    config: Mapping[str, Any]
    tensors: Mapping[Place, torch.Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or its safetensors file. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    files = _weight_files(path)
    configs = {name: _json(folder / name) for name in CONFIGS if (folder / name).is_file()}
    shapes = _shapes(files)
    places = {name: parsed(name) for name in shapes}
    unknown = sorted(name for name, place in places.items() if place is None)
    if unknown or not places:
        what = mistake(folder, shapes, configs.get("adapter_config.json", {}))
        if what is not None:
            raise InputError(f"{path}: {what}")
        raise InputError(
            f"{path}: found {len(unknown)} of {len(places)} tensors that no PERFT checkpoint has: nothing is imported "
            "while one of them is left over",
            [f"{name} {list(shapes[name])}" for name in unknown],
        )
    tensors: dict[Place, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                place = places[name]
                assert place is not None
                if place in tensors:
                    raise InputError(f"{path}: found two tensors for one place; the second is {name}")
                tensors[place] = opened.get_tensor(name)
    return Checkpoint(configs.get("config.json", configs.get("adapter_config.json", {})), tensors)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in PICKLES:
            raise InputError(_pickled(path))
        return [path]
    if not path.is_dir():
        raise InputError(f"found nothing at {path}, expected a checkpoint's folder")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if pickles := pickles_of(path):
            raise InputError(_pickled(pickles[0]))
        raise InputError(f"found no .safetensors file in {path}, expected model.safetensors and config.json")
    return files


def _pickled(file: Path) -> str:
    return f"found {file}, a pickle, which can run code and is never opened here: convert it to safetensors ({SAVE})"


def _json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"found no JSON in {file}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"found no object in {file}")
    return found


def _shapes(files: list[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"found no safetensors in {file}: {error}") from None
    return shapes
