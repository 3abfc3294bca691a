"""Owns the checks before every route: whether it exists, who may call it, and how many requests at once.

The outermost ASGI middleware. Invariant: a request reaches the app only with scope["state"] holding its `caller`,
`route`, `request_id`, `asked` and `facts` (and `check_room`, where its sequences count among its key's), with the path
and the client that were checked here, and it no longer counts among its key's requests when its last byte is sent.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Services, services_of
from server.api.error_responses import ApiError, error_response, internal_error
from server.api.route_table import CONSOLE_ROUTES, Route, dialect_of, match, more_routes, routes_at
from server.auth.access import Asked
from server.auth.keys import ANONYMOUS
from server.bodies.receive import check_encoding
from server.errors import EngineUnavailableError, ServerError
from server.inference.request_context import RequestFacts
from server.middleware.access_log import Polls
from server.middleware.request_body import RequestBody
from server.middleware.request_path import one_path, request_id_of, shown_path
from server.middleware.unknown_route import not_found

logger = logging.getLogger(__name__)
_CLIENT_LEFT = 499
POLLED = ("/v1/adapters", "/v1/adapters/{name}")
"""What the console polls beside its own routes."""
SMALL_BODY_BYTES = 64 * 1024


class AccessControl:
    """Rejects requests that must not reach the app, by the app's services. clock: monotonic seconds."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._polls = Polls(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._handle(_RequestCycle(scope, send, services_of(scope["app"]), self._clock), receive)

    async def _handle(self, cycle: "_RequestCycle", receive: Receive) -> None:
        try:
            rejection = cycle.admit()
            if rejection is None:
                await self._app(cycle.scope, cycle.bounded(receive), cycle.send)
            else:
                await rejection(cycle.scope, receive, cycle.send)
        except Exception as error:
            logger.error("request %s failed: %r", cycle.request_id, error)
            if not cycle.status:
                response = internal_error(cycle.request_id).response(dialect_of(cycle.scope), cycle.request_id)
                await response(cycle.scope, receive, cycle.send)
            raise
        finally:
            cycle.end(self._polls)


class _RequestCycle:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, services: Services | None, clock: Callable[[], float]) -> None:
        headers = Headers(scope=scope)
        self.request_id = request_id_of(headers)
        self.method: str = scope["method"]
        self.route: Route | None = None
        self.caller = ANONYMOUS
        self.facts = RequestFacts()
        self.status = 0
        self._headers, self._send, self._services, self._clock = headers, send, services, clock
        self._began = clock()
        self._asked = _asked(scope, services)
        self._leave: Callable[[], None] | None = None
        self._body: RequestBody | None = None
        self._outer, self.scope = scope, self._inner_scope(scope)

    def _inner_scope(self, scope: Scope) -> Scope:
        """The app's scope: with one path and the client's own address, the request ID as a header, and a GET in place
        of a HEAD."""
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": self.request_id, "facts": self.facts, "caller": self.caller, "asked": self._asked}
        state["is_head"] = self.method == "HEAD"
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        return {
            **scope,
            **one_path(scope),
            "client": self._client(scope),
            "method": "GET" if self.method == "HEAD" else self.method,
            "headers": [*others, (b"x-request-id", self.request_id.encode())],
        }

    def _client(self, scope: Scope) -> tuple[str, int] | None:
        """Who asks: whoever connected, or the client of a proxy that the operator named."""
        peer: tuple[str, int] | None = scope.get("client")
        if self._services is None:
            return peer
        address = None if peer is None else peer[0]
        found = self._services.settings.proxies.client_of(address, self._headers.getlist("x-forwarded-for"))
        return peer if found == address or found is None else (found, 0)

    def bounded(self, receive: Receive) -> Receive:
        """The app's `receive`."""
        assert self.route is not None
        limits = None if self._services is None or self.route.is_upload else self._services.settings
        self._body = RequestBody(receive, limits)
        return self._body

    def admit(self) -> Response | None:
        """The response to a request that is rejected; None if the app gets it."""
        path, root_path = self.scope["path"], self.scope.get("root_path", "")
        more = more_routes(None if self._services is None else self._services.settings)
        self.route = match(self.method, path, root_path, more)
        if self._services is not None:  # for the log of a rejected request
            self.caller = self._services.keys.identify(*self._asked.key_headers) or ANONYMOUS
        try:
            if self.route is None:
                return _no_route(self.method, self.scope, self._shown_path(), more)
            self._enter(self.route)
        except (ServerError, ApiError) as error:
            response = error_response(error, self.scope)
            if self._has_large_body():
                response.headers["Connection"] = "close"
            return response
        self.scope["state"] |= {"caller": self.caller, "route": self.route}
        return None

    def _has_large_body(self) -> bool:
        """Whether more may be coming than is worth reading just to keep a connection."""
        length = self._headers.get("content-length", "0")
        return "transfer-encoding" in self._headers or not length.isdigit() or int(length) > SMALL_BODY_BYTES

    def _enter(self, route: Route) -> None:
        services = self._services
        if services is None:
            if not route.answers_early:
                raise EngineUnavailableError("the server is starting; retry in a few seconds", retry_after_s=5)
            return
        if route.path == "/metrics" and services.metrics_address is not None:
            raise not_found(self.method, self.scope, self._shown_path())
        caller = services.access.caller(self._asked, route.need, route.method, route.path)
        client = (self.scope.get("client") or (None,))[0]
        self.caller = replace(caller, client=client, request_id=self.request_id)
        check_encoding(self._headers)
        if route.selects_model and not self.caller.is_admin:
            limits, label = services.rate_limits, self.caller.label
            limits.enter(label)
            self._leave = lambda: limits.leave(label)
            self.scope["state"]["check_room"] = partial(limits.check_room, label)

    async def send(self, message: Message) -> None:
        """Send a message of the response, with the request ID; for a HEAD only the headers."""
        if message["type"] == "http.response.start":
            has_left = self._body is not None and self._body.is_cut_off
            self.status = _CLIENT_LEFT if has_left else message["status"]
            message.setdefault("headers", [])  # ASGI lets an app leave them out
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers["X-Content-Type-Options"] = "nosniff"  # nothing that somebody uploaded or generated is a page
            if dialect_of(self.scope) == "anthropic":
                headers["Request-Id"] = self.request_id  # where its clients look
            if headers.get("content-type", "").startswith("text/event-stream"):  # no proxy may hold an event back
                headers.setdefault("Cache-Control", "no-cache")
                headers["X-Accel-Buffering"] = "no"
        elif message["type"] == "http.response.body":
            if not message.get("more_body", False):
                self._free()
            if self.method == "HEAD":
                message = {**message, "body": b""}
        await self._send(message)

    def end(self, polls: Polls) -> None:
        """The response has ended, one way or another."""
        self._free()
        if self._services is not None and not self._is_repeated_poll(polls):
            path = self.route.path if self.route else self._shown_path()
            status, seconds = self.status or _CLIENT_LEFT, self._clock() - self._began
            label = self.caller.label
            self._services.access_log.write(self.request_id, label, self.method, path, status, seconds, self.facts)

    def _is_repeated_poll(self, polls: Polls) -> bool:
        """Whether an open console asked once more what it asks every second, and got it."""
        if self.route is None or self.route.method != "GET" or self.status not in (200, 304):
            return False
        is_own = self._asked.headers.get("sec-fetch-site") == ["same-origin"]
        if not (self.route in CONSOLE_ROUTES or (is_own and self.route.path in POLLED)):
            return False
        if self.caller.label is None and any(self._asked.key_headers) and not self._has_metrics_key():
            return False  # somebody may be guessing keys
        client = (self.scope.get("client") or (None,))[0]
        return polls.is_repeated(client, self.caller.label, self.route.path)

    def _has_metrics_key(self) -> bool:
        return self._services is not None and self._services.keys.may_read_metrics(*self._asked.key_headers)

    def _shown_path(self) -> str:
        """The path as it was asked for, without a key that it may hold."""
        return shown_path(self._outer["path"], self._services.keys.has if self._services else lambda part: True)

    def _free(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def _asked(scope: Scope, services: Services | None) -> Asked:
    """What of a request counts for its access. scope: as it came, with the peer that connected."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    peer = (scope.get("client") or (None,))[0]
    is_trusted = services is not None and services.settings.proxies.has(peer)
    return Asked(headers, scope.get("scheme", "http"), is_trusted)


def _no_route(method: str, scope: Scope, shown: str, more: tuple[Route, ...]) -> Response:
    """404 for a path that is not listed, 405 for a method that its routes do not have, 204 for OPTIONS."""
    allowed = {route.method for route in routes_at(scope["path"], scope.get("root_path", ""), more)}
    if not allowed:
        raise not_found(method, scope, shown)
    allow = {"Allow": ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))}
    if method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    error = ApiError(405, "method_not_allowed", f"found {method[:16]}, expected one of {allow['Allow']}")
    response = error_response(error, scope)
    response.headers.update(allow)
    return response
