"""Owns how a body comes in: its headers and its size.

Invariant: no byte of a body is read that its headers or its size forbid, and the large bodies that are being received
or parsed never take more than the budget together.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from server.bodies.limits import KEPT_BYTES, BodyLimits
from server.errors import InvalidRequestError, RequestTooLargeError, UnsupportedEncodingError
from server.sharing.budget import BodyBudget

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raises UnsupportedEncodingError for a compressed body. headers: by lower-case name."""
    encodings = [item.strip().lower() for item in headers.get("content-encoding", "").split(",")]
    if found := [item for item in encodings if item not in ("", "identity")]:
        shown = ", ".join(found)[:100]
        raise UnsupportedEncodingError(
            f"found a body with Content-Encoding: {ascii(shown)[1:-1]}, expected one that is not compressed; "
            "send it without Content-Encoding",
            param="Content-Encoding",
        )


def is_json(content_type: str | None) -> bool:
    """Whether a body of this type is read as JSON: no type at all is. Raises InvalidRequestError for another charset
    than UTF-8."""
    kind, *parameters = (part.strip().lower() for part in (content_type or "").split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in _UTF8:
            shown = ascii(value.strip()[:40])[1:-1]
            raise InvalidRequestError(f"found the charset {shown}, expected JSON in UTF-8", param="Content-Type")
    return kind in ("", "application/json") or (kind.startswith("application/") and kind.endswith("+json"))


def check_json(content_type: str | None) -> None:
    """Raises InvalidRequestError unless a body of this type is read as JSON."""
    if not is_json(content_type):
        shown = ascii((content_type or "")[:60])[1:-1]
        raise InvalidRequestError(
            f"found the Content-Type {shown}, expected application/json (curl: -H 'Content-Type: application/json')",
            param="Content-Type",
        )


class ReceivedBody:
    """A whole body. release: gives its bytes back to the budget, once it is no longer needed."""

    def __init__(self, content: bytes, release: Callable[[], None] = lambda: None) -> None:
        self.content, self.release = content, release
        self.is_large = len(content) > KEPT_BYTES


async def receive_body(
    receive: Receive,
    headers: Mapping[str, str],
    limits: BodyLimits,
    budget: BodyBudget,
    caller: str | None = None,
) -> ReceivedBody:
    """The whole body. caller: as the budget takes it.

    Raises RequestTooLargeError, before reading what is known to be too large, or InvalidRequestError if the client
    leaves.
    """
    length = headers.get("content-length", "")
    known = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None
    if known is not None and known > limits.body_bytes:
        raise _too_large(str(known), limits)
    release: Callable[[], None] | None = None
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            # A chunked body may become as large as the limit allows: that is what it takes.
            if release is None and max(known or 0, size) > KEPT_BYTES:
                release = await budget.take(limits.body_bytes if known is None else known, caller)
            message = await receive()
            if message["type"] != "http.request":
                raise InvalidRequestError("the client went away before its body was complete")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limits.body_bytes:
                raise _too_large(f"more than {limits.body_bytes}", limits)
            chunks.append(chunk)
            if not message.get("more_body", False):
                content = b"".join(chunks)
                chunks.clear()
                return ReceivedBody(content, release or (lambda: None))
    except BaseException:
        if release is not None:
            release()
        raise


def _too_large(found: str, limits: BodyLimits) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"found a body of {found} bytes, expected at most {limits.body_bytes} (the setting max_body_bytes)"
    )
