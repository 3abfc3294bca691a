"""Owns what an attack on POST /v1/adapters is: how its request is made, and the refusal it must meet.

Invariant: making a request costs next to nothing, however large its body: bodies are iterators.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from perft.base_model import BaseShape

BOUNDARY = "perft-hostile-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


@dataclass(frozen=True)
class Setting:
    """What is attacked: the base it serves and its limits.

    A low max_adapter_bytes (at most 64 MiB: the bombs unpack to 512) and short times keep the attacks quick.
    """

    base: BaseShape
    base_name: str
    max_adapter_bytes: int
    timeout_s: float
    idle_timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Nothing is sent for so long, or until the server answers."""

    seconds: float


@dataclass(frozen=True)
class Cut:
    """The client goes away here."""


Piece = bytes | Pause | Cut


@dataclass(frozen=True)
class Upload:
    """A request. content_length: what the client says (None: chunked), whatever comes."""

    pieces: Iterable[Piece]
    content_type: str | None = FORM
    content_length: int | None = None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Attack:
    """A request that must be refused with `status` and `code`.

    Each of `words` must occur in the message or in a violation. is_bad_http: the HTTP server itself may end it, with a
    400 of its own or without an answer. needs_bytes: with a lower max_adapter_bytes it is too large before it is
    anything else.
    """

    status: int
    code: str
    words: tuple[str, ...]
    make: Callable[[Setting], Upload]
    is_bad_http: bool = False
    needs_bytes: int = 0

    def problems(self, status: int, body: bytes) -> list[str]:
        """How an answer (status 0: none came) differs from the refusal expected."""
        if self.is_bad_http and (status == 0 or (status == 400 and not body.startswith(b"{"))):
            return []
        if status == 0:
            return ["the connection ended without an answer"]
        try:
            error = json.loads(body)["error"]
            said = [error["message"], *error.get("violations", [])]
        except (ValueError, KeyError, TypeError):
            return [f"found {status} with {body[:200]!r}, expected an error object"]
        found = (status, error["code"])
        problems = [] if found == (self.status, self.code) else [f"found {found}, expected {self.status, self.code}"]
        problems += [f"nobody said {word!r}" for word in self.words if not any(word in text for text in said)]
        if self.code == "invalid_adapter" and not error.get("violations"):
            problems.append("no violations listed")
        problems += [f"does not print: {text!r}" for text in said if not text.isprintable()]
        return [*problems, f"said: {str(said)[:1000]}"] if problems else []


Attacks = dict[str, Attack]


def part(name: str, data: bytes, file_name: str | None = None, headers: str = "") -> bytes:
    """One part of the form."""
    shown = "" if file_name is None else f'; filename="{file_name}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n{headers}\r\n'
    return head.encode() + data + b"\r\n"


def begun(name: str) -> bytes:
    """A part whose data follows, without end."""
    return part(name, b"")[:-2]


END = f"--{BOUNDARY}--\r\n".encode()


def form(parts: Mapping[str, bytes]) -> bytes:
    """A whole body."""
    return b"".join(part(name, data) for name, data in parts.items()) + END


def whole(body: bytes) -> Upload:
    """A body sent at once, its length told truly."""
    return Upload([body], content_length=len(body))
