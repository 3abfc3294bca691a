"""Owns the gate in front of every route: what is listed, who may, how much at once; an ASGI middleware.

Invariant: a request reaches the app only with scope["state"] holding its `caller`, `route`, `request_id` and `facts`,
and a place it takes among its key's requests is free again before its response's last byte.
"""

import inspect
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.route_table import Route, match, routes_at
from server.auth.keys import ANONYMOUS, Caller, KeyRing
from server.auth.origin import OriginPolicy
from server.auth.rate_limits import RateLimits
from server.errors import ApiError
from server.middleware.access_log import AccessLog, RequestFacts

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499
SMALL_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class AccessPolicy:
    """What the gate decides by (app.state.perft_guard). serves_metrics: /metrics is not on a listener of its own."""

    keys: KeyRing
    reach: OriginPolicy
    limits: RateLimits
    log: AccessLog
    serves_metrics: bool = True

    def caller(self, route: Route, headers: Headers) -> Caller:
        """Who asks. Raises ApiError if the route needs more than the request has."""
        given = headers.get("authorization"), headers.get("x-api-key")
        known = self.keys.identify(*given)
        if route.need == "none":
            return known or ANONYMOUS
        if route.need == "metrics" and self.keys.may_read_metrics(*given):
            return known or ANONYMOUS
        if known is not None and (known.is_admin or route.need == "inference"):
            return known
        if self._needs_key(route, known):
            raise _refused(route, known, any(given))
        problem = self.reach.page_problem(headers) if route.need == "inference" else self.reach.local_problem(headers)
        if problem:
            raise ApiError(403, "forbidden", f"{route.method} {route.path}: {problem}")
        return Caller(known.label if known else None, route.need == "admin")

    def _needs_key(self, route: Route, known: Caller | None) -> bool:
        """Whether a key is missing: the one the route is kept for, or any where the server has some."""
        if known is None and self.keys.needs_key:
            return True
        if route.need == "inference":
            return False
        return self.keys.has_admin or (route.need == "metrics" and self.keys.has_metrics_key)


def _refused(route: Route, known: Caller | None, is_given: bool) -> ApiError:
    if known is not None:
        return ApiError(
            403, "forbidden", f"found the key {known.label!r}, expected the {route.need} key for {route.path}"
        )
    found = "a key that is none of this server's" if is_given else "no key"
    return ApiError(401, "invalid_api_key", f"found {found}, expected the header `Authorization: Bearer KEY`")


class AccessControl:
    """Answers what must not pass; app.state.perft_guard (an AccessPolicy) says what may."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            admission: AccessPolicy | None = getattr(scope["app"].state, "perft_guard", None)
            await self._pass(_Exchange(scope, send, admission, self._clock), receive)

    async def _pass(self, exchange: "_Exchange", receive: Receive) -> None:
        try:
            refusal = exchange.admit()
            if refusal is None:
                await self._app(exchange.scope, receive, exchange.send)
            else:
                await refusal(exchange.scope, receive, exchange.send)
        except Exception as error:
            if not exchange.status:
                await (await _unexpected(exchange.scope, error))(exchange.scope, receive, exchange.send)
            raise
        finally:
            exchange.end()


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, admission: AccessPolicy | None, clock: Callable[[], float]) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.method: str = scope["method"]
        self.route: Route | None = None
        self.caller = ANONYMOUS
        self.facts = RequestFacts()
        self.status = 0
        self._headers, self._send, self._admission, self._clock = headers, send, admission, clock
        self._began = clock()
        self._leave: Callable[[], None] | None = None
        self.scope = self._inner_scope(scope)

    def _inner_scope(self, scope: Scope) -> Scope:
        """What the app sees: the request id as a header too, and a GET in place of a HEAD."""
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": self.request_id, "facts": self.facts, "caller": self.caller}
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        return {
            **scope,
            "method": "GET" if self.method == "HEAD" else self.method,
            "headers": [*others, (b"x-request-id", self.request_id.encode())],
        }

    def admit(self) -> Response | None:
        """The answer, if the app is not to see the request."""
        path, root_path = self.scope["path"], self.scope.get("root_path", "")
        self.route = match(self.method, path, root_path)
        try:
            if self.route is None:
                return _no_route(self.method, path, root_path)
            self._enter(self.route)
        except ApiError as error:
            response = error.response()
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
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
        if self._admission is None:
            if route.path != "/health":
                raise ApiError(503, "engine_unavailable", "found the server starting; ask again soon", retry_after=5)
            return
        if route.need == "metrics" and not self._admission.serves_metrics:
            raise _not_found()
        client = (self.scope.get("client") or (None,))[0]
        caller = self._admission.caller(route, self._headers)
        self.caller = replace(caller, client=client, request_id=self.request_id)
        if route.selects_model and not self.caller.is_admin:
            limits, label = self._admission.limits, self.caller.label
            limits.enter(label)
            self._leave = lambda: limits.leave(label)

    async def send(self, message: Message) -> None:
        """Pass a message of the response on, with the request id; of a HEAD's only the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.request_id
        elif message["type"] == "http.response.body":
            if not message.get("more_body", False):
                self._free()
            if self.method == "HEAD":
                message = {**message, "body": b""}
        await self._send(message)

    def end(self) -> None:
        """The response has ended, one way or another."""
        self._free()
        if self._admission is not None:
            path = None if self.route is None else self.route.path
            status, seconds = self.status or _CLIENT_LEFT, self._clock() - self._began
            label = self.caller.label
            self._admission.log.write(self.request_id, label, self.method, path, status, seconds, self.facts)

    def _free(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def _no_route(method: str, path: str, root_path: str) -> Response:
    """404 for a path that is not listed, 405 for another method than its own; what OPTIONS asks for is no secret."""
    allowed = {route.method for route in routes_at(path, root_path)}
    if not allowed:
        raise _not_found()
    allow = {"Allow": ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))}
    if method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    refused = ApiError(405, "method_not_allowed", f"found {method[:16]}, expected one of {allow['Allow']}")
    response = refused.response()
    response.headers.update(allow)
    return response


async def _unexpected(scope: Scope, error: Exception) -> Response:
    """The app's own answer to an error nobody expected, given here so that it has a request id as well."""
    handler = scope["app"].exception_handlers.get(Exception)
    if handler is None:
        return ApiError(500, "internal_error", "found an error nobody expected; the server's log has it").response()
    answer = handler(Request(scope), error)
    response: Response = await answer if inspect.isawaitable(answer) else answer
    return response


def _not_found() -> ApiError:
    return ApiError(404, "not_found", "found no such route here; GET /openapi.json lists those there are")
