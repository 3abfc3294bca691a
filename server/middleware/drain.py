"""Owns how a running server ends: after SIGTERM, or the death of its engine, it admits nothing new, lets running
responses finish, then stops.

vLLM's own handler ends the engine at once; ours waits first and then hands over to it (as SIGINT). Invariant: a
response that began before the signal is sent whole, unless the limit passes first.
"""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Lifecycle, Services, services_of
from server.api.error_responses import error_response
from server.api.route_table import Route
from server.connections.limits import CLOSE_EXTENSION
from server.engine.health import EngineHealth
from server.errors import EngineUnavailableError

POLL_S = 0.05
CLOSE_TIMEOUT_S = 5.0
"""Seconds that changes whose clients have left may take to finish."""
LAST_ANSWERS_S = 2.0
"""Seconds for which a server whose engine died still answers (503), so that probes and clients learn of it."""

logger = logging.getLogger(__name__)


class SignalHandler:
    """Drains on SIGTERM and SIGHUP, for at most `limit_s` seconds, closes the services, then sends SIGINT."""

    def __init__(self, lifecycle: Lifecycle, limit_s: float, close: Callable[[], Awaitable[None]]) -> None:
        self._lifecycle, self._limit_s, self._close = lifecycle, limit_s, close
        self._until = math.inf
        self._tasks: list[asyncio.Task[None]] = []

    def install(self) -> None:
        """From now on SIGTERM drains, then ends the server. Call it on its loop, once vLLM's own handlers are set."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._start)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            loop.add_signal_handler(signal.SIGHUP, self._start)

    def watch(self, health: EngineHealth, died: Callable[[str], None]) -> None:
        """End the server once its engine died; `died` is then called with what died."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._end_with_engine(health, died)))

    def _start(self) -> None:
        if not self._lifecycle.is_draining:
            self._lifecycle.is_draining = True
            self._until = time.monotonic() + self._limit_s
            self._tasks.append(asyncio.get_running_loop().create_task(self._finish()))

    async def _end_with_engine(self, health: EngineHealth, died: Callable[[str], None]) -> None:
        death, lifecycle = await health.died(), self._lifecycle
        if lifecycle.is_draining and health.was_asked_to_end():
            return  # the signal went to all of the server's processes
        logger.critical("%s; the server ends", death)
        died(death)
        was_draining, lifecycle.is_draining = lifecycle.is_draining, True
        lifecycle.reason = f"{death}; retry on another server"
        self._until = min(self._until, time.monotonic() + LAST_ANSWERS_S)
        if not was_draining:
            await asyncio.sleep(LAST_ANSWERS_S)
            await self._finish()

    async def _finish(self) -> None:
        while self._lifecycle.responses_running and time.monotonic() < self._until:
            await asyncio.sleep(POLL_S)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._close()
        except Exception as error:  # whatever it is, the server ends; the store bears a kill at any moment
            logger.warning("the server ends with changes under way: %r", error)
        os.kill(os.getpid(), signal.SIGINT)


class DrainMiddleware:
    """ASGI middleware inside access control: counts running responses, rejects new requests while draining."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: Route | None = scope.get("state", {}).get("route") if scope["type"] == "http" else None
        services: Services | None = services_of(scope["app"]) if route else None
        if route is None or services is None or route.path in ("/health", "/metrics"):
            return await self._app(scope, receive, send)
        lifecycle = services.lifecycle
        if lifecycle.is_draining:
            error = EngineUnavailableError(lifecycle.reason, retry_after_s=5)
            response = error_response(error, scope)
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        lifecycle.responses_running += 1
        try:
            await self._app(scope, receive, self._closing(lifecycle, scope, send))
        finally:
            lifecycle.responses_running -= 1

    @staticmethod
    def _closing(lifecycle: Lifecycle, scope: Scope, send: Send) -> Send:
        """End the connection with the response if that begins or ends while the server drains."""
        close_connection: Callable[[], None] = scope.get("extensions", {}).get(CLOSE_EXTENSION, lambda: None)

        async def closing(message: Message) -> None:
            if lifecycle.is_draining:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
                close_connection()
            await send(message)

        return closing
