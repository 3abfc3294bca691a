"""Owns reading a checkpoint of the authors: what its config.json says, and its tensors, by place.

Invariant: every tensor has a place, or the checkpoint is refused with the names of those that have none; all are
float32, float16 or bfloat16, and of one family's names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perft.convert.files import configs_in, entries_in
from perft.convert.layout import Place, family_of, parsed
from perft.convert.mistakes import mistake
from perft.convert.settings import shown
from perft.convert.weights import FLOATS, Entry
from perft.errors import InputError
from perft.reading import printable

MOST_BYTES = 64 * 1024**3
"""The largest checkpoint: an adapter has some GB at most."""


@dataclass(frozen=True)
class Checkpoint:
    """config: what config.json and adapter_config.json say; None without such a file. family: whose names its tensors
    have, a key of layout.BLOCKS. tensors: by place, not loaded."""

    folder: Path
    config: Mapping[str, Any] | None
    family: str
    tensors: Mapping[Place, Entry]


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or its safetensors file. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    entries = entries_in(path)
    if not entries:
        raise InputError(f"{path}: found no tensors, expected those of a PERFT checkpoint")
    configs = configs_in(folder)
    places = _places(path, folder, entries, configs)
    _check_types(path, entries)
    families = sorted({family_of(name) for name in entries})
    if len(families) > 1:
        raise InputError(f"{path}: found names of tensors of {' and '.join(families)}, expected one family's")
    tensors: dict[Place, Entry] = {}
    for name, place in places.items():
        if place in tensors:
            raise InputError(
                f"{path}: found two tensors for one place: {printable(tensors[place].name)} and {printable(name)}"
            )
        tensors[place] = entries[name]
    return Checkpoint(folder, _one_config(path, configs), families[0], tensors)


def _places(
    path: Path, folder: Path, entries: Mapping[str, Entry], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Place]:
    found = {name: parsed(name) for name in entries}
    places = {name: place for name, place in found.items() if place is not None}
    unknown = sorted(found.keys() - places)
    if not unknown:
        return places
    what = mistake(
        folder, {name: entry.shape for name, entry in entries.items()}, configs.get("adapter_config.json", {})
    )
    if what is not None:
        raise InputError(f"{path}: {what}")
    raise InputError(
        f"{path}: found {len(unknown)} of {len(entries)} tensors that no PERFT checkpoint has: nothing is imported "
        "while one of them is left over",
        [f"{printable(name)} {list(entries[name].shape)}" for name in unknown],
    )


def _check_types(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises InputError for a type that is not imported, and for more data than an adapter has."""
    strange = {name: entry.dtype for name, entry in entries.items() if entry.dtype not in FLOATS}
    if strange:
        raise InputError(
            f"{path}: found tensors of a type that is not imported, expected float32, float16 or bfloat16",
            [f"{printable(name)}: found {shown(dtype)}" for name, dtype in strange.items()],
        )
    size = sum(file.stat().st_size for file in {entry.file for entry in entries.values()})
    if size > MOST_BYTES:
        raise InputError(f"{path}: found {size:,} bytes of weights, expected an adapter of at most {MOST_BYTES:,}")


def _one_config(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What both files say together."""
    if not configs:
        return None
    merged: dict[str, Any] = {}
    for name, config in configs.items():
        if differing := sorted(key for key in merged.keys() & config.keys() if merged[key] != config[key]):
            raise InputError(
                f"{path}: config.json and {name} differ: keep one of them", [shown(key) for key in differing]
            )
        merged |= config
    return merged
