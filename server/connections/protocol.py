"""Owns one client's connection: uvicorn's own protocol on httptools, with a bound on all that it leaves unbounded.

httptools, because h11 takes thirty times as long for a body of tiny chunks and streams no faster; but vLLM's limits of
headers are h11's. Invariant: whatever a client sends or leaves unsent, without any key, its connection holds little
memory (max_header_bytes and one read), and ends within the time limits unless a response is being made or read.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.api.error_responses import as_api_error
from server.connections.limits import CLOSE_EXTENSION, ConnectionLimits, OpenConnections
from server.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerError,
    TooManyConnectionsError,
    UrlTooLongError,
)

MAX_URL_BYTES = 16 * 1024
MAX_PIPELINED = 16
"""Requests of one connection that may wait for the response to the one before."""
LINGER_S = 2.0
LINGER_BYTES = 16 * 1024**2
"""How long, and how much, a refused client may go on sending while it reads why: closed at once, it would see a reset
in place of the response."""


class _LingeringTransport:
    """What uvicorn's response writes to and closes."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


def bounded_protocol(limits: ConnectionLimits) -> type["BoundedProtocol"]:
    """uvicorn's `http`: the class of one server's connections, which are counted together."""
    return type("BoundedProtocol", (BoundedProtocol,), {"open_connections": OpenConnections(limits)})


class BoundedProtocol(HttpToolsProtocol):
    """See the module. Made by `bounded_protocol`."""

    open_connections: OpenConnections

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = self.open_connections.limits
        self.timeout_keep_alive = self._limits.keep_alive_s  # type: ignore[assignment]  # call_later takes both
        self._problem: ServerError | None = None
        self._running: RequestResponseCycle | None = None
        """The request that the app has; `cycle` is the latest, which may wait behind it."""
        self._messages = 0
        """Requests begun."""
        self._is_in_head = self._is_in_body = False
        self._given = self._head_bytes = self._body_bytes = self._headers_found = 0
        """Of this request: bytes given to the parser, and what it made of them."""
        self._head_since: float | None = None
        """When the head that is awaited should have begun to arrive; None between requests and from its end on."""
        self._unread_since: float | None = None
        """When the response was found complete while the request's body still arrives."""
        self._unwritable_since: float | None = None
        self._closing_since: float | None = None
        self._is_refused = False
        self._discarded = 0
        """Bytes thrown away since the client was refused."""

    # --- asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_since = self.loop.time()
        try:
            self.open_connections.add(self, self.client[0] if self.client else None)
        except TooManyConnectionsError as error:
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.remove(self)
        if self._running is not None and not self._running.response_complete:
            self._tell_that_the_client_left(self._running)  # uvicorn tells the latest request alone
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return self._discard(len(data))
        is_between, before = not (self._is_in_head or self._is_in_body), self._messages
        super().data_received(data)
        return self._look_at_size(len(data), is_between, before)

    def _look_at_size(self, given: int, was_between: bool, messages_before: int) -> None:
        """Judge what was received and is no whole request yet. was_between: no request had begun before it."""
        if self._is_refused:
            return
        if self._messages - messages_before <= int(was_between):  # all of it belongs to one request
            self._given += given
        is_waiting = self._is_in_head or (was_between and self._messages == messages_before)
        if is_waiting and self._head_since is None:
            self._head_since = self.loop.time()
        if problem := self._size_problem():
            self._refuse(problem)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @staticmethod
    def _tell_that_the_client_left(cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.message_event.set()

    def pause_writing(self) -> None:
        self._unwritable_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unwritable_since = None
        super().resume_writing()

    # --- the parser's side

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._messages += 1
        self._is_in_head, self._is_in_body = True, False
        self._given = self._head_bytes = self._body_bytes = self._headers_found = 0

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > MAX_URL_BYTES:
            message = f"found a URL of more than {MAX_URL_BYTES} bytes, expected a shorter one"
            self._stop_parsing(UrlTooLongError(message))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        self._headers_found += 1
        if self._headers_found > self._limits.max_headers:
            message = f"found more than {self._limits.max_headers} headers, expected at most so many (max_headers)"
            self._stop_parsing(HeadersTooLargeError(message))
        if self._head_bytes > self._limits.max_header_bytes:
            self._stop_parsing(self._too_large())
        if not self._is_in_body:  # trailers are no part of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            message = f"found more than {MAX_PIPELINED} requests sent before their responses, expected one at a time"
            self._stop_parsing(InvalidRequestError(message))
        self._is_in_head, self._is_in_body, self._head_since = False, True, None
        super().on_headers_complete()
        self.cycle.transport = _LingeringTransport(self.transport, partial(self._close, self.cycle))  # type: ignore[assignment]
        close = partial(setattr, self.cycle, "keep_alive", False)
        self.scope["extensions"] = {CLOSE_EXTENSION: close}  # type: ignore[dict-item]
        if self.parser.should_upgrade():  # what follows is nothing that it reads
            close()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._unread_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._problem or InvalidRequestError("found no valid HTTP request"))

    def _should_upgrade_to_ws(self) -> bool:
        """No: no route takes a websocket, and there the limits would not hold."""
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """Not worth a line: HTTP allows to ignore an offer of another protocol."""

    # --- limits

    def check(self, now: float) -> None:
        """End the connection if it is overdue. now: seconds of the loop's clock."""
        limits = self._limits
        if self._is_refused:
            if now - (self._closing_since or now) > LINGER_S:
                self.transport.abort()
        elif self._unwritable_since is not None and now - self._unwritable_since > limits.write_timeout_s:
            self.transport.abort()  # it reads nothing of its response
        elif self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > limits.write_timeout_s:
                self.transport.abort()
        elif self._is_answering():
            self._head_since = None if self._head_since is None else now
        elif self._head_since is not None and now - self._head_since > limits.header_timeout_s:
            self._end_late_head()
        elif self._is_in_body:
            self._unread_since = self._unread_since or now
            if now - self._unread_since > limits.body_idle_timeout_s:
                self.transport.close()

    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _end_late_head(self) -> None:
        if not self._is_in_head:  # nothing was asked, so nothing is answered
            return self.transport.close()
        limit = self._limits.header_timeout_s
        message = f"found no complete headers after {limit:g} s, expected them sooner (header_timeout_s)"
        return self._refuse(RequestTimeoutError(message))

    def _size_problem(self) -> ServerError | None:
        """What is too large, of all that the parser has not reported yet or never does."""
        limit = self._limits.max_header_bytes
        if self._is_in_head and self._given > limit:
            return self._too_large()
        if self._is_in_body and self._given - 2 * self._body_bytes > 2 * limit:
            return InvalidRequestError("found more framing than content in the body, expected larger chunks")
        return None

    def _too_large(self) -> HeadersTooLargeError:
        limit = self._limits.max_header_bytes
        return HeadersTooLargeError(f"found headers of more than {limit} bytes, expected fewer (max_header_bytes)")

    def _stop_parsing(self, problem: ServerError) -> None:
        """Make the parser give up; uvicorn then calls `send_400_response`."""
        self._problem = problem
        raise problem

    def _refuse(self, error: ServerError) -> None:
        """Answer in place of the app, and end the connection."""
        running = self._running
        if running is not None and not running.response_complete:
            running.keep_alive = False
            if running is not self.cycle or running.response_started or not running.more_body:
                return self.transport.close()  # its response is not about this
            self._tell_that_the_client_left(running)
        self.transport.write(as_api_error(error).http11(uuid4().hex))
        return self._linger()

    def _close(self, ended: RequestResponseCycle) -> None:
        """A response has ended, and the connection with it: at once, unless the body of its request still arrives."""
        if ended is self.cycle and self._is_in_body and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Send no more, and throw away what comes until the client has read the response."""
        self._is_refused, self._closing_since = True, self.loop.time()
        if not self.transport.can_write_eof():
            return self.transport.close()
        self.transport.write_eof()
        return self.flow.resume_reading()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > LINGER_BYTES:
            self.transport.abort()
