"""Owns what a web page of another site gets: vLLM's CORS rules (`--allowed-origins`, none by default), with our errors.

Invariant: what Starlette would answer in words alone has the shape and the ID of every other response.
"""

from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.error_responses import error_response
from server.api.route_table import dialect_of
from server.errors import ForbiddenError
from server.middleware.request_path import request_id_of


class CrossOrigin(CORSMiddleware):
    """Starlette's, with our answer to a browser that asks beforehand and may not."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            request = Request(scope)
            if "origin" in request.headers and "access-control-request-method" in request.headers:
                await self._answer(scope)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        response = self.preflight_response(headers)
        if response.status_code >= 400:
            found = (
                f"found the Origin {headers['origin'][:100]!r} asking for {headers['access-control-request-method']!r}"
            )
            message = f"{found:.300}, expected what this server was started to allow (--allowed-origins and its kin)"
            response = error_response(ForbiddenError(message, param="Origin"), scope)
            response.headers["Vary"] = "Origin"
        response.headers["X-Request-Id"] = request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        if dialect_of(scope) == "anthropic":
            response.headers["Request-Id"] = request_id
        return response


def in_our_shape(middleware: list[Middleware]) -> None:
    """Put ours in place of Starlette's, with the same rules."""
    for number, given in enumerate(middleware):
        cls: Any = given.cls
        if cls is CORSMiddleware:
            rules: dict[str, Any] = dict(given.kwargs)
            middleware[number] = Middleware(CrossOrigin, **rules)
