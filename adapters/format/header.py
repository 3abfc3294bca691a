"""Owns the header of a safetensors file: which tensors lie behind it, in which order.

The safetensors library judges it. It refuses (version 0.8) lengths that lie, JSON or UTF-8 that is broken or deep, keys
missing or of the wrong type, dtypes it does not know, shapes that overflow, and data with a gap, an overlap, or bytes
that belong to no tensor. It lets pass, and this module refuses: headers of 1 to 100 MB, any number of tensors, a first
byte other than "{", duplicate names (the last one counts), unknown keys, a list in place of a tensor's object, an
object in place of a dtype's string, and metadata that is null.

Invariant: the tensors of a `Header` are its file's data, each byte in exactly one, in the order given.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import SEEK_END, BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapters.format.recognize import START_BYTES, recognized
from adapters.format.strict_json import parse_object, quote

MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 4096
SHOWN_PROBLEMS = 20
PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"


class UnreadableWeightsError(ValueError):
    """A file is not a safetensors file that can be trusted; the message is the violation."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        listed = "; ".join(problems[:SHOWN_PROBLEMS])
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        super().__init__(f"adapter_model.safetensors: not a readable safetensors file ({listed}{more})")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor. dtype: as safetensors writes it, such as "BF16". size: of its data, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Header:
    """raw: every byte of the file before the data. tensors: in the order of their data."""

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.tensors}


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, Header]]:
    """A weights file, open behind its header. UnreadableWeightsError also for what the disk refuses."""
    try:
        with path.open("rb") as file:
            try:
                header = read_header(file)
            except UnreadableWeightsError as error:
                raise _explained(file, error) from error
            yield file, header
    except OSError as error:
        raise UnreadableWeightsError(str(error)) from error


def _explained(file: BufferedReader, error: UnreadableWeightsError) -> UnreadableWeightsError:
    """The same error with what the file is instead, or where it was cut off, as far as that can be told."""
    size = file.seek(0, SEEK_END)
    file.seek(0)
    start = file.read(START_BYTES)
    found = recognized(start)
    if found is not None and found.kind != "safetensors":
        return UnreadableWeightsError(f"found {found.text}")
    expected = _declared_bytes(file, size)
    if expected is None or size == expected:
        return error
    wrong = "it was cut off: download or copy it again" if size < expected else "bytes follow its data"
    found_bytes = f"found {size} of the {expected} bytes that it declares, {wrong}"
    return UnreadableWeightsError(found_bytes, *error.problems)


def _declared_bytes(file: BufferedReader, size: int) -> int | None:
    """How long a safetensors file is by its length and header; None if they cannot say. size: of the file."""
    file.seek(0)
    prefix = file.read(PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or length > MAX_HEADER_BYTES or size < PREFIX_BYTES + length:
        return PREFIX_BYTES + length if 0 < length <= MAX_HEADER_BYTES and size > PREFIX_BYTES else None
    try:
        entries = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != METADATA_KEY]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not all(type(end) is int and 0 <= end < 1 << 62 for end in ends):
        return None
    return PREFIX_BYTES + length + max(ends, default=0)


def read_header(
    file: BufferedReader, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> Header:
    """Read the header of a file opened at its start; afterwards the file stands at the first byte of the data.

    Raises UnreadableWeightsError.
    """
    prefix = file.read(PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes:
        raise UnreadableWeightsError(f"the header's length is {length}, expected at most {max_header_bytes}")
    try:
        with safe_open(file.name, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableWeightsError(str(error)[:300]) from error
    text = file.read(length)
    if not text.startswith(b"{"):
        raise UnreadableWeightsError("the header does not begin with '{'")
    values, problems = parse_object(text, "the header")
    if values is None or problems:
        raise UnreadableWeightsError(*problems)
    metadata = values.pop(METADATA_KEY, {})
    if metadata is None:
        raise UnreadableWeightsError(f"{METADATA_KEY}: found null, expected an object of strings")
    if len(values) > max_tensors:
        raise UnreadableWeightsError(f"found {len(values)} tensors, expected at most {max_tensors}")
    if strange := {name: value for name, value in values.items() if not _is_plain(value)}:
        expected = "expected an object of dtype, shape and data_offsets"
        raise UnreadableWeightsError(*(f"{name[:120]}: found {quote(strange[name])}, {expected}" for name in strange))
    by_offset = sorted(values.items(), key=lambda item: item[1]["data_offsets"])
    return Header(prefix + text, metadata, tuple(_entry(name, value) for name, value in by_offset))


def _is_plain(value: Any) -> bool:
    """Whether the entry of a tensor is written in the one way that every reader understands."""
    is_object = isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}
    return is_object and isinstance(value["dtype"], str)


def _entry(name: str, value: dict[str, Any]) -> TensorEntry:
    begin, end = value["data_offsets"]
    return TensorEntry(name, value["dtype"], tuple(value["shape"]), end - begin)
