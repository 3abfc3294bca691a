"""Owns which files belong to a checkpoint's folder: its safetensors files, and what its configuration files say.

Invariant: a pickle is never opened, and nothing outside of the folder is named by what lies in it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perft.convert.mistakes import PICKLES, pickles_of
from perft.convert.settings import shown
from perft.convert.weights import Entry, entries_of
from perft.errors import InputError
from perft.reading import check_plain, printable, read_json

CONFIGS = ("config.json", "adapter_config.json")
SAVE = "safetensors.torch.save_file, on a machine where you trust it"


def entries_in(path: Path) -> dict[str, Entry]:
    """All tensors of a folder's safetensors files, or of one file, by name; none is loaded. Raises InputError."""
    entries: dict[str, Entry] = {}
    for file in _weight_files(path):
        for name, entry in entries_of(file).items():
            if name in entries:
                raise InputError(
                    f"{path}: found the tensor {printable(name)} in {entries[name].file.name} and {file.name}"
                )
            entries[name] = entry
    if path.is_dir():
        for index in sorted(path.glob("*.safetensors.index.json")):
            _check_index(index, entries)
    return entries


def configs_in(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The objects in a folder's configuration files, by the file's name. Raises InputError."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in CONFIGS:
        if os.path.lexists(folder / name):
            value = read_json(folder / name)
            if not isinstance(value, dict):
                raise InputError(f"found no object in {folder / name}")
            found[name] = value
    return found


def _weight_files(path: Path) -> list[Path]:
    if not os.path.lexists(path):
        raise InputError(f"found nothing at {path}, expected a checkpoint's folder")
    if not path.is_dir():
        check_plain(path)
        if path.suffix in PICKLES:
            raise InputError(_pickled(path))
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if pickles := pickles_of(path):
            raise InputError(_pickled(pickles[0]))
        raise InputError(f"found no .safetensors file in {path}, expected model.safetensors and config.json")
    return files


def _check_index(index: Path, entries: Mapping[str, Entry]) -> None:
    """Raises InputError unless every file and tensor that an index names is there."""
    value = read_json(index)
    named = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{index}: found no weight_map, an object that names a file for each tensor")
    problems = []
    for file in sorted(set(named.values())):
        if Path(file).name != file or file == "..":
            problems.append(f"{shown(file)}: expected a file of this folder")
        elif not os.path.lexists(index.parent / file):
            problems.append(f"{shown(file)}: found no such file, expected all that the index names")
    if not problems:
        problems = [
            f"{printable(name)}: found no such tensor in {shown(file)}"
            for name, file in named.items()
            if name not in entries or entries[name].file.name != file
        ]
    if problems:
        raise InputError(f"{index} names what is not there", problems)


def _pickled(file: Path) -> str:
    return f"found {file}, a pickle, which can run code and is never opened here: convert it to safetensors ({SAVE})"
