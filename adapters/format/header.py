"""Owns the header of a safetensors file, read strictly before the safetensors library opens the file.

Invariant: behind a header without problems lie exactly the bytes its tensors say: each byte of the data belongs to
one tensor, and each tensor's length is its shape's.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.format.strict_json import parse_object, quote

MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: its bytes are data[begin:end]."""

    name: str
    begin: int
    end: int


def header_problems(path: Path, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> list[str]:
    """Every reason why the header of the file at `path` is unsound; reads at most `max_header_bytes` of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES:
            return [f"found {size} bytes, expected at least the {PREFIX_BYTES} of the header's length"]
        (length,) = struct.unpack("<Q", prefix)
        data_bytes = size - PREFIX_BYTES - length
        if data_bytes < 0:
            return [f"the header's length is {length}, but {size - PREFIX_BYTES} bytes follow"]
        if length > max_header_bytes:
            return [f"the header's length is {length}, expected at most {max_header_bytes}"]
        raw = file.read(length)
    if not raw.startswith(b"{"):
        return ["the header does not begin with '{'"]
    header, problems = parse_object(raw, "the header")
    if header is None or problems:
        return problems
    return _object_problems(header, data_bytes, max_tensors)


def _object_problems(header: dict[str, Any], data_bytes: int, max_tensors: int) -> list[str]:
    problems = _metadata_problems(header.pop(METADATA_KEY, {}))
    if len(header) > max_tensors:
        return [*problems, f"found {len(header)} tensors, expected at most {max_tensors}"]
    entries: list[TensorEntry] = []
    for name, value in header.items():
        wrong = _entry_problems(value, data_bytes)
        problems += [f"{name[:120]}: {problem}" for problem in wrong]
        if not wrong:
            entries.append(TensorEntry(name, *value["data_offsets"]))
    return problems or _layout_problems(entries, data_bytes)


def _metadata_problems(metadata: object) -> list[str]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return []
    return [f"{METADATA_KEY}: found {quote(metadata)}, expected an object of strings"]


def _entry_problems(value: Any, data_bytes: int) -> list[str]:
    """What is wrong with one tensor's entry, looked at alone."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return [f"found {quote(value)}, expected an object of dtype, shape and data_offsets"]
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    problems: list[str] = []
    if not isinstance(dtype, str) or dtype not in BITS:
        problems.append(f"found dtype {quote(dtype)}, which safetensors does not have")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        problems.append(f"found shape {quote(shape)}, expected at most {MAX_DIMENSIONS} integers, none below 0")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"found data_offsets {quote(offsets)}, expected two ascending integers, none below 0")
    elif offsets[1] > data_bytes:
        problems.append(f"found data_offsets {quote(offsets)}, which lie outside the {data_bytes} bytes of data")
    return problems or _length_problems(BITS[dtype], shape, offsets)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _length_problems(bits: int, shape: list[int], offsets: list[int]) -> list[str]:
    """Whether the length of the data is the shape's. The product stops growing where it exceeds any file."""
    length = offsets[1] - offsets[0]
    total = 0 if 0 in shape else bits
    for dimension in shape:
        total *= dimension
        if total > length * 8:
            break
    if total == length * 8 and max(shape, default=0) < 2**63:
        return []
    return [f"found {length} bytes at data_offsets {offsets}, which is not the size of shape {quote(shape)}"]


def _layout_problems(entries: list[TensorEntry], data_bytes: int) -> list[str]:
    """Overlaps and gaps: the tensors, by their begin, must follow each other from the first byte to the last."""
    problems: list[str] = []
    covered = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < covered:
            problems.append(f"{entry.name[:120]}: begins at {entry.begin}, overlapping what ends at {covered}")
        elif entry.begin > covered:
            problems.append(f"{entry.name[:120]}: begins at {entry.begin}, leaving a gap from {covered}")
        covered = max(covered, entry.end)
    if covered < data_bytes:
        problems.append(f"{data_bytes - covered} bytes at the end belong to no tensor")
    return problems
