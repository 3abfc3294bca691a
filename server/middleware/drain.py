"""Owns how a running server ends: after SIGTERM it admits nothing new, lets running responses finish, then stops.

vLLM's own handler ends the engine at once; ours waits first and then hands over to it (as SIGINT). Invariant: a
response that began before the signal is sent whole, unless the limit passes first.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Lifecycle, Services, services_of
from server.api.error_responses import as_api_error
from server.api.route_table import Route
from server.errors import EngineUnavailableError

POLL_S = 0.05
CLOSE_TIMEOUT_S = 5.0
"""Seconds that changes whose clients have left may take to finish."""

logger = logging.getLogger(__name__)


class SignalHandler:
    """Drains on SIGTERM, for at most `limit_s` seconds, closes the services, then sends SIGINT."""

    def __init__(self, lifecycle: Lifecycle, limit_s: float, close: Callable[[], Awaitable[None]]) -> None:
        self._lifecycle, self._limit_s, self._close = lifecycle, limit_s, close
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """From now on SIGTERM drains, then ends the server. Call it on its loop, once vLLM's own handlers are set."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._start)

    def _start(self) -> None:
        if not self._lifecycle.is_draining:
            self._lifecycle.is_draining = True
            self._task = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        until = time.monotonic() + self._limit_s
        while self._lifecycle.responses_running and time.monotonic() < until:
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
            error = EngineUnavailableError("the server is shutting down; retry on another server", retry_after_s=5)
            response = as_api_error(error).response()
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        lifecycle.responses_running += 1
        try:
            await self._app(scope, receive, self._closing(lifecycle, send))
        finally:
            lifecycle.responses_running -= 1

    @staticmethod
    def _closing(lifecycle: Lifecycle, send: Send) -> Send:
        """Ask the client for a new connection if the response begins while the server drains."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and lifecycle.is_draining:
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        return closing
