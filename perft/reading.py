"""Owns how a file from outside is read: a plain file of a bounded size, in UTF-8, JSON without a key given twice.

What does not fit is an InputError that names the file; nothing is waited for, and no more is held than the limit.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from perft.errors import InputError

CONFIG_BYTES = 4 * 1024 * 1024
"""The largest file of settings that is read: a model's config.json has some kilobytes."""


def check_plain(path: Path, most_bytes: int | None = None) -> int:
    """The size of a plain file in bytes. Raises InputError for what is none, cannot be read, or is larger than that."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no plain file"
        raise InputError(f"cannot read {path}: found {kind}, expected a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {path}: Permission denied")
    if most_bytes is not None and found.st_size > most_bytes:
        raise InputError(f"cannot read {path}: found {found.st_size:,} bytes, expected at most {most_bytes:,}")
    return found.st_size


def read_text(path: Path, most_bytes: int = CONFIG_BYTES) -> str:
    """A file's text, without a byte order mark. Raises InputError."""
    check_plain(path, most_bytes)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found text that is not UTF-8 (byte {error.start}), expected UTF-8") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON value. Raises InputError, which begins with `where`."""
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except RecursionError:
        raise InputError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def read_json(path: Path, most_bytes: int = CONFIG_BYTES) -> Any:
    """The JSON value in a file. Raises InputError."""
    return parse_json(read_text(path, most_bytes), str(path))


def printable(text: str) -> str:
    """Text from outside as one line that a terminal shows and does not obey: every character that does not print is
    escaped, line ends, control codes and marks of direction too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`). Raises ValueError for a key that is given twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found
