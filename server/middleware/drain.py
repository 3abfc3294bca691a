"""Owns what a server that ends does with requests: those that run are finished, new ones are refused.

Invariant: a response that began before is sent whole, unless the host's limit passes first (hosting/process.py).
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Lifecycle, Services, services_of
from server.api.error_responses import error_response
from server.api.route_table import CONSOLE_ROUTES, Route
from server.connections.limits import CLOSE_EXTENSION
from server.errors import EngineUnavailableError


class DrainMiddleware:
    """ASGI middleware inside access control: counts running responses, rejects new requests while draining."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: Route | None = scope.get("state", {}).get("route") if scope["type"] == "http" else None
        services: Services | None = services_of(scope["app"]) if route else None
        if route is None or services is None or route.path in ("/health", "/metrics") or route in CONSOLE_ROUTES:
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
