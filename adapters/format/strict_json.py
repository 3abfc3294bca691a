"""Owns the strict reading of a JSON object: what Python's own json tolerates is a violation.

Invariant: an object without violations is valid UTF-8, has no duplicate key at any level, no NaN and no Infinity.
"""

import json
from collections.abc import Iterable
from typing import Any

from adapters.format.recognize import BOM, START_BYTES, recognized


def parse_object(raw: bytes, where: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The object in `raw` (None if there is none), and what is wrong with the JSON itself, each naming `where`.

    UTF-8's byte order mark in front is skipped.
    """
    found: list[str] = []

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                found.append(f"{where}: duplicate key {quote(key)}: keep one of them")
            result[key] = value
        return result

    def constant(name: str) -> float:
        found.append(f"{where}: found {name}, which is not a JSON number")
        return float(name)

    try:
        values = json.loads(raw.removeprefix(BOM).decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return None, [*found, f"{where}: found half of a surrogate pair in a string, which is not a character"]
    except UnicodeDecodeError as error:
        return None, [f"{where}: not UTF-8 ({error.reason} at byte {error.start}){_instead(raw)}"]
    except RecursionError:
        return None, [f"{where}: nested too deeply"]
    except ValueError as error:
        return None, [f"{where}: not JSON ({error}){_instead(raw)}"]
    if not isinstance(values, dict):
        return None, [f"{where}: found {json_kind(values)}, expected an object"]
    return values, found


def _instead(raw: bytes) -> str:
    """What was handed in that is no JSON, as far as that is known, to follow what is wrong with it."""
    found = recognized(raw[:START_BYTES])
    return f"; found {found.text}" if found is not None and found.kind != "json" else ""


def json_kind(value: object) -> str:
    """What a value read from JSON is called there, with its article."""
    kinds = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def quote(value: object) -> str:
    """A value as it was found, cut to at most 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # an int of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
