"""Owns reading safetensors files from outside: their headers, judged before a byte of the data is loaded.

Invariant: the data of the tensors of a judged file is all of the file behind its header, each byte in exactly one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from perft.errors import InputError
from perft.reading import check_plain, parse_json, printable

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that are imported, as safetensors writes them: bytes of a value."""
HEADER_BYTES = 32 * 1024 * 1024
"""The largest header that is read: one of 100,000 tensors has some 15 MB."""

_PREFIX = 8
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not loaded. dtype: as safetensors writes it, such as "BF16"."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def loaded(entries: Sequence[Entry]) -> list[torch.Tensor]:
    """Their values, in the order given. Raises InputError."""
    found: dict[Entry, torch.Tensor] = {}
    for file in {entry.file for entry in entries}:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {entry: opened.get_tensor(entry.name) for entry in entries if entry.file == file}
        except (OSError, SafetensorError) as error:
            raise _no_safetensors(file, printable(str(error))) from None
    return [found[entry] for entry in entries]


def entries_of(file: Path) -> dict[str, Entry]:
    """The tensors of a file, by name. Raises InputError."""
    size = check_plain(file)
    header, start = _header(file, size)
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        if not _is_plain(value):
            raise _no_safetensors(file, f"the tensor {printable(name)} has no dtype, shape and data_offsets")
        begin, end = value["data_offsets"]
        entries[name] = Entry(file, name, value["dtype"], tuple(value["shape"]))
        width = FLOATS.get(value["dtype"])
        if width is not None and end - begin != width * math.prod(value["shape"]):
            raise _no_safetensors(file, f"the data of {printable(name)} has another size than its shape")
        spans.append((begin, end, name))
    _check_spans(file, spans, start, size)
    return entries


def _header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's object, and where the data begins; the file has `size` bytes."""
    with file.open("rb") as opened:
        start = opened.read(len(_LFS))
        if start == _LFS:
            raise InputError(
                f"found a Git LFS pointer in {file}, not the weights: run `git lfs pull` where it was cloned"
            )
        length = int.from_bytes(start[:_PREFIX], "little")
        if size < _PREFIX or length > size - _PREFIX:
            raise _no_safetensors(file, f"it has {size} bytes, and its header would be longer (is it cut off?)")
        if length > HEADER_BYTES:
            raise _no_safetensors(file, f"its header has {length:,} bytes, expected at most {HEADER_BYTES:,}")
        opened.seek(_PREFIX)
        header = parse_json(opened.read(length), f"found no safetensors in {file}: its header")
    if not isinstance(header, dict):
        raise _no_safetensors(file, "its header is no JSON object")
    return header, _PREFIX + length


def _is_plain(value: Any) -> bool:
    """Whether this describes a tensor."""
    if not isinstance(value, Mapping) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = value["shape"], value["data_offsets"]
    return (
        isinstance(value["dtype"], str) and _are_counts(shape) and _are_counts(offsets)
        and len(offsets) == 2 and offsets[0] <= offsets[1]
    )  # fmt: skip


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 62 for each in values)


def _check_spans(file: Path, spans: list[tuple[int, int, str]], start: int, size: int) -> None:
    """Raises InputError unless the data of one tensor follows on another's, from `start` to the end of the file."""
    covered = start
    for begin, end, name in sorted(spans):
        if start + begin != covered:
            raise _no_safetensors(file, f"the data of {printable(name)} does not follow on the tensor's before it")
        covered = start + end
    if covered != size:
        what = "is it cut off?" if covered > size else "what follows belongs to no tensor"
        raise _no_safetensors(file, f"it has {size:,} bytes, and its tensors end at {covered:,} ({what})")


def _no_safetensors(file: Path, why: str) -> InputError:
    return InputError(f"found no safetensors in {file}: {why}")
