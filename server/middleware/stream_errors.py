"""Owns how a failed inference request ends for its client: with our error in place of vLLM's, in its route's dialect.

Invariant: bytes are held back only until the line they belong to is known to be no error, and the head of a stream
until its first bytes: a request that fails before them has a status of its own.
"""

import logging
import re
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import Message, Send

from server.api.error_responses import ApiError, as_api_error
from server.api.route_table import Dialect
from server.api.translation.vllm_errors import (
    content_field,
    engine_unavailable,
    parsed,
    refusal_of,
    says_engine_is_dead,
    spec_field,
    translated,
)
from server.errors import ContextLengthError, InvalidRequestError
from server.inference.request_context import RequestContext

MAX_ERROR_BYTES = 1024**2
"""Of an error of vLLM's; what is beyond is not read."""
_ERROR_LINE = re.compile(rb'data: \{("type": ?"error", ?)?"error"')
"""How an error begins in a stream: OpenAI's form, and Anthropic's."""
_ERROR_HEADS = (b'data: {"error"', b'data: {"type":"error","error"', b'data: {"type": "error", "error"')
_ERROR_EVENT = b"event: error\n"

logger = logging.getLogger(__name__)


class FailureSender:
    """The request's `send`. fields: of the request's body, as `translated` takes them."""

    def __init__(
        self,
        context: RequestContext,
        dialect: Dialect,
        send: Send,
        fields: Mapping[str, bytes] = MappingProxyType({}),
        request_id: str | None = None,
    ) -> None:
        self._context, self._dialect, self._send = context, dialect, send
        self._fields, self._request_id = fields, request_id
        self._head: Message | None = None
        self._status = 0
        self._is_stream = self._is_sent = self._is_over = False
        self._error = bytearray()
        self._held, self._events = b"", 0
        self._is_within_line = self._is_after_error = False

    async def __call__(self, message: Message) -> None:
        if self._is_over:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message.get("headers", ()))
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._status < 400:
                self._head = message
                if not self._is_stream:
                    await self._begin()
        elif message["type"] == "http.response.body" and self._status >= 400:
            self._error += message.get("body", b"")[: MAX_ERROR_BYTES - len(self._error)]
            if not message.get("more_body", False):
                await self._respond(self._known() or self._translated(parsed(bytes(self._error))))
        elif message["type"] == "http.response.body" and self._is_stream:
            await self._stream(message)
        else:
            await self._pass_on(message)

    async def send_failure(self, error: Exception) -> bool:
        """The app ended with an exception: send why. False if it is an unexpected one and the app around may still
        answer, or if it is too late for an answer."""
        failure = self._known()
        if self._is_over:
            return failure is not None
        if failure is None and self._status == 0:
            return False
        if failure is None:
            said = str(error.__cause__ or error)
            is_dead = says_engine_is_dead(said)
            failure = engine_unavailable("the engine has ended") if is_dead else as_api_error(error, self._request_id)
        if not self._is_sent:
            await self._respond(failure)
            return True
        if not self._is_stream:
            return False
        self._log(failure)
        before = self._held + (b"\n\n" if self._is_within_line or self._held else b"")
        event = failure.event(self._dialect, self._request_id, self._events)
        await self._pass_on({"type": "http.response.body", "body": before + event, "more_body": False})
        return True

    def _known(self) -> ApiError | None:
        """Why the request failed, as far as we saw it; what vLLM says of it is dropped."""
        if (failure := self._context.failure) is not None:
            if isinstance(failure, InvalidRequestError) and failure.param is None:
                of_text = isinstance(failure, ContextLengthError)
                failure.param = content_field(self._fields) if of_text else spec_field(self._fields)
            return as_api_error(failure, self._request_id, field="model")
        if self._context.refusal is not None:
            return refusal_of(self._context.refusal, self._fields)
        return None

    def _translated(self, body: object) -> ApiError:
        error = translated(self._status, body, self._fields, self._request_id)
        if error.status >= 500:
            logger.error("request %s failed inside vLLM: %.500r", self._request_id, body)
        return error

    def _log(self, error: ApiError) -> None:
        if error.status >= 500 and error.code != "internal_error":  # that one is logged already
            logger.warning("request %s failed: %s", self._request_id, error.message)

    async def _respond(self, error: ApiError) -> None:
        """Answer with the error alone."""
        self._is_over = True
        self._log(error)
        response = error.response(self._dialect, self._request_id)
        head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self._send(head)
        await self._send({"type": "http.response.body", "body": response.body, "more_body": False})

    async def _stream(self, message: Message) -> None:
        before, error, after = self._split(message)
        if error is None:
            return await self._pass_on({**message, "body": before})
        if not self._is_sent and not before:
            return await self._respond(error)
        self._log(error)
        event = error.event(self._dialect, self._request_id, self._events)
        await self._pass_on({**message, "body": before + event + after})

    def _split(self, message: Message) -> tuple[bytes, ApiError | None, bytes]:
        """A chunk of the stream as what is before an error, the error, and what is after it. Of lines that may still
        become one, the beginning is held; the rest of a line that was sent in part passes."""
        data = self._held + message.get("body", b"")
        self._held = b""
        before = passed = bytearray()
        error: ApiError | None = None
        if self._is_within_line:
            rest, newline, data = data.partition(b"\n")
            passed += rest + newline
            self._is_within_line = not newline
        for line in data.splitlines(keepends=True):
            is_whole = line.endswith(b"\n")
            if not is_whole and message.get("more_body", False) and _may_be_error(line):
                self._held = line
            elif line == _ERROR_EVENT or (self._is_after_error and line == b"\n"):
                continue  # the error's own event has both
            elif _ERROR_LINE.match(line):
                self._is_after_error = True
                error = self._known() or self._translated(parsed(line.removeprefix(b"data: ")))
                passed = bytearray()
            else:
                self._is_after_error = False
                passed += line
                self._is_within_line = not is_whole
        self._events += before.count(b"\n\n")
        return bytes(before), error, bytes(passed) if error else b""

    async def _begin(self) -> None:
        if self._head is not None:
            head, self._head, self._is_sent = self._head, None, True
            await self._send(head)

    async def _pass_on(self, message: Message) -> None:
        await self._begin()
        self._is_over = not message.get("more_body", False)
        await self._send(message)


def _may_be_error(line: bytes) -> bool:
    """Whether the beginning of a line may be that of an error."""
    return _ERROR_LINE.match(line) is not None or any(
        head.startswith(line) or line.startswith(head) for head in (*_ERROR_HEADS, _ERROR_EVENT)
    )
