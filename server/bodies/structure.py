"""Owns how JSON text is measured before anybody parses it: values, depth, numbers; at C's speed, whatever it holds.

Invariant: what is inside strings counts for nothing, and no measure takes longer for text that is over its limit.
"""

import re
from collections.abc import Iterator

import numpy as np

_STRING = re.compile(rb'"[^"]*"')
_LONG_NUMBER = re.compile(rb"-?\d[\d.]{15,}(?:[eE][+-]?\d+)?|-?\d[\d.]*[eE][+-]?\d+")
_LARGEST = 2**63 - 1
MAX_DIGITS = 384
WINDOW = 128 * 1024


def without_strings(raw: bytes) -> bytes:
    """JSON text with every string empty."""
    if b"\\" in raw:
        raw = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    return _STRING.sub(b'""', raw)


def opens(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def _windows(raw: bytes) -> Iterator[bytes]:
    """JSON text piece by piece, each without its strings; strings may span pieces."""
    start, is_inside = 0, False
    while start < len(raw):
        end = start + WINDOW
        while raw[end - 1 : end] == b"\\":  # an escape stays whole
            end += 1
        piece = raw[start:end]
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        is_cut = (piece.count(b'"') + is_inside) % 2 == 1
        piece = b'"' * is_inside + piece + b'"' * is_cut
        yield _STRING.sub(b'""', piece)
        start, is_inside = end, is_cut


def count(raw: bytes, limit: int) -> int:
    """The values in JSON text, or slightly more; over `limit` it stops counting."""
    values = raw.count(b",") + opens(raw) + 1
    if values > limit:
        values = 1
        for piece in _windows(raw):
            values += piece.count(b",") + opens(piece)
            if values > limit:
                break
    return values


def depth(raw: bytes) -> int:
    """How deep arrays and objects are nested in JSON text; 1 may be none."""
    if (most := opens(raw)) <= 1:
        return most
    text = np.frombuffer(without_strings(raw), np.uint8)
    brackets = text[(text == 91) | (text == 93) | (text == 123) | (text == 125)]  # [ ] { }
    if not len(brackets):
        return 0
    return int(np.cumsum(np.where((brackets == 91) | (brackets == 123), 1, -1)).max())


def bad_number(raw: bytes, is_schema: bool = False) -> str | None:
    """The first number that vLLM cannot take: an integer of more than 64 bits, a float as large, or infinity.

    is_schema: only infinity and endless digits count, because nothing computes with the number.
    """
    if not _LONG_NUMBER.search(raw):
        return None
    for found in _LONG_NUMBER.finditer(without_strings(raw)):
        text = found[0]
        largest = float("inf") if is_schema else float(_LARGEST)
        if len(text) > MAX_DIGITS or abs(float(text)) >= largest:
            digits = text.removeprefix(b"-")
            if len(text) <= MAX_DIGITS and digits.isdigit() and -_LARGEST - 1 <= int(text) <= _LARGEST:
                continue
            return text[:40].decode()
    return None


def elements(raw: bytes) -> tuple[int, int]:
    """How many elements a JSON array has, and the most values that one of them has."""
    text = np.frombuffer(without_strings(raw), np.uint8)
    opening = (text == 91) | (text == 123)
    closing = (text == 93) | (text == 125)
    levels = np.cumsum(np.where(opening, 1, 0) - np.where(closing, 1, 0))
    between = np.flatnonzero((text == 44) & (levels == 1))
    values = np.cumsum(opening | (text == 44))
    ends = np.concatenate((values[between], values[-1:]))
    return len(between) + 1, int(np.diff(ends, prepend=1).max())
