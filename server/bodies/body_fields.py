"""Owns the fields of a body: which its JSON object has, without parsing what they hold.

Invariant: what a `BodyFields` writes is one JSON object in UTF-8 with every name once, so vLLM cannot read another
value of a field than the one that was checked here.
"""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from server.errors import InvalidRequestError

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KINDS = {"[": "an array", "{": "an object", '"': "a string", "t": "a boolean", "f": "a boolean", "n": "null"}
_VALID_ESCAPES = re.compile(rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_AT_BYTE = re.compile(r" \(byte (\d+)\)")


class BodyFields:
    """The fields of a JSON object: name -> its value as it is written. Raises InvalidRequestError for another body."""

    def __init__(self, body: bytes) -> None:
        self._raw = dict(zip(found := _top_level(body), map(bytes, found.values()), strict=True))

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._raw)

    def raw(self, name: str) -> bytes:
        """The JSON text of a field; `null` if it is absent."""
        return self._raw.get(name, b"null")

    def is_null(self, name: str) -> bool:
        """Whether a field is absent or null."""
        return self.raw(name) == b"null"

    def value(self, name: str) -> Any:
        """A field's value; for fields that are known to be small, or strings. None if it is absent."""
        return msgspec.json.decode(self.raw(name))

    def kind(self, name: str) -> str:
        """What a field holds, in the words of JSON."""
        return _KINDS.get(chr(self.raw(name)[0]), "a number")

    def set(self, name: str, value: Any) -> None:
        self._raw[name] = msgspec.json.encode(value)

    def set_raw(self, name: str, raw: bytes) -> None:
        self._raw[name] = raw

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._raw.pop(name, None)

    def keep(self, names: frozenset[str]) -> None:
        """Drop all fields but these."""
        self._raw = {name: raw for name, raw in self._raw.items() if name in names}

    def json(self) -> bytes:
        """The object's JSON text."""
        return b"{" + b",".join(msgspec.json.encode(name) + b":" + raw for name, raw in self._raw.items()) + b"}"


def _top_level(body: bytes) -> dict[str, msgspec.Raw]:
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        if not body.isascii():
            body.decode()  # the decoder does not look into what it skips
        return _OBJECT.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid JSON: found invalid UTF-8 at byte {error.start}, expected JSON in UTF-8"
        ) from None
    except msgspec.ValidationError:
        raise InvalidRequestError(
            f"found {_KINDS.get(body.strip()[:1].decode(), 'a number')} as the body, expected a JSON object"
        ) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {_reason(body, error)}") from None


def _reason(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "found an empty body, expected a JSON object"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if has_lone_surrogate(body):
        return "found half of a surrogate pair (such as \\ud83d alone) in a string, expected both halves"
    reason = str(error).removeprefix("JSON is malformed: ")
    found = _AT_BYTE.search(reason)
    if found and body[int(found[1]) : int(found[1]) + 1] in (b"N", b"I"):
        return f"found NaN or Infinity at byte {found[1]}, expected a number that JSON has"
    return reason


def has_lone_surrogate(text: bytes) -> bool:
    """Whether JSON text has an escaped half of a surrogate pair, in a string or a name."""
    return b"\\u" in text and _SURROGATE.search(_VALID_ESCAPES.sub(b".", text)) is not None
