"""Owns the end of a running server: SIGTERM admits nothing new, lets what runs finish, then stops.

vLLM's own handler ends the engine at once; ours waits first and then hands over to it (as SIGINT). Invariant: a
response that had begun before the signal is whole, unless the limit passes first.
"""

import asyncio
import os
import signal
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.route_table import Route
from server.errors import ApiError

POLL_S = 0.05


class DrainState:
    """How many responses are under way, and whether new requests are still taken (app.state.perft_drain)."""

    def __init__(self) -> None:
        self.is_draining = False
        self.under_way = 0

    def take_signal(self, limit_s: float) -> None:
        """From now on SIGTERM drains for at most `limit_s` seconds, then ends the server. Call it on its loop, once
        vLLM's own handlers are set."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._start, limit_s)

    def _start(self, limit_s: float) -> None:
        if not self.is_draining:
            self.is_draining = True
            self._task = asyncio.get_running_loop().create_task(self._finish(limit_s))

    async def _finish(self, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while self.under_way and time.monotonic() < until:
            await asyncio.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGINT)


class DrainMiddleware:
    """ASGI middleware inside the guard: counts what is under way, refuses what is new while draining."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: Route | None = scope.get("state", {}).get("route") if scope["type"] == "http" else None
        drain: DrainState | None = getattr(scope["app"].state, "perft_drain", None) if route else None
        if route is None or drain is None or route.path in ("/health", "/metrics"):
            return await self._app(scope, receive, send)
        if drain.is_draining:
            refused = ApiError(503, "engine_unavailable", "the server is shutting down: ask another one", retry_after=5)
            response = refused.response()
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        drain.under_way += 1
        try:
            await self._app(scope, receive, self._closing(drain, send))
        finally:
            drain.under_way -= 1

    @staticmethod
    def _closing(drain: DrainState, send: Send) -> Send:
        """Ask the client for a new connection if the response begins while the server ends."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and drain.is_draining:
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        return closing
