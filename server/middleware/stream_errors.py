"""Owns how a failed inference request ends for its client: with our error in place of vLLM's.

Invariant: bytes are held back only after a failure, and only until the line they belong to is whole.
"""

import json
import re
from typing import Any

from starlette.types import Message, Send

from server.api.error_responses import ApiError, as_api_error
from server.inference.request_context import RequestContext

_ERROR_LINE = re.compile(rb'data: \{("type": ?"error", ?)?"error"')
"""How an error begins in a stream: OpenAI's form, and Anthropic's."""


class FailureSender:
    """The request's `send`. path: of the route, which decides the form of an error in a stream."""

    def __init__(self, context: RequestContext, path: str, send: Send) -> None:
        self._context, self._path, self._send = context, path, send
        self._started = self._replaced = self._is_stream = False
        self._is_within_line = False
        self._held = b""

    async def __call__(self, message: Message) -> None:
        failure = self._context.failure
        if message["type"] == "http.response.start":
            if failure is not None and message["status"] >= 400:
                return await self._replace()
            self._started = True
            self._is_stream = (
                dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream")
            )
            await self._send(message)
        elif message["type"] == "http.response.body" and self._is_stream and failure is not None:
            await self._send({**message, "body": self._rewritten(message)})
        elif not self._replaced:
            self._note(message.get("body", b""))
            await self._send(message)

    async def send_failure(self) -> bool:
        """The app ended with an exception: send why. False if there is nothing to send, or it is too late."""
        if self._context.failure is None or self._replaced:
            return self._replaced
        if not self._started:
            await self._replace()
            return True
        if not self._is_stream:
            return False
        before = self._held + (b"\n\n" if self._is_within_line or self._held else b"")
        await self._send({"type": "http.response.body", "body": before + self._event(), "more_body": False})
        return True

    async def _replace(self) -> None:
        """Respond with the failure alone; what vLLM sends is dropped."""
        self._replaced = True
        response = self._failure().response()
        await self._send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body, "more_body": False})

    def _rewritten(self, message: Message) -> bytes:
        """A chunk of the stream with the failure in place of error lines. The rest of a line already sent in part stays
        as it is; the beginning of a line is held until the line is whole."""
        data = self._held + message.get("body", b"")
        self._held = b""
        rest = b""
        if self._is_within_line:
            rest, newline, data = data.partition(b"\n")
            rest += newline
            self._is_within_line = not newline
        lines = data.splitlines(keepends=True) if not self._is_within_line else []
        if lines and not lines[-1].endswith(b"\n") and message.get("more_body", False):
            self._held = lines.pop()
        return rest + b"".join(self._replaced_line(line) for line in lines)

    def _replaced_line(self, line: bytes) -> bytes:
        return self._data() + b"\n" if _ERROR_LINE.match(line) else line

    def _event(self) -> bytes:
        return b"event: error\n" + self._data() + b"\n\n"

    def _data(self) -> bytes:
        """The failure as the data of an event, in the route's dialect."""
        failure = self._failure()
        body: dict[str, Any] = failure.body()
        if self._path == "/v1/messages":
            body = {"type": "error", **body}
        elif self._path == "/v1/responses":
            flat = {"code": failure.code, "message": failure.message, "param": failure.param}
            body = {"type": "error", **flat, **body}
        return b"data: " + json.dumps(body).encode()

    def _failure(self) -> ApiError:
        assert self._context.failure is not None
        return as_api_error(self._context.failure, field="model")

    def _note(self, body: bytes) -> None:
        if body:
            self._is_within_line = not body.endswith(b"\n")
