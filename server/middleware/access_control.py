"""Owns the checks before every route: whether it exists, who may call it, and how many requests at once.

The outermost ASGI middleware. Invariant: a request reaches the app only with scope["state"] holding its `caller`,
`route`, `request_id` and `facts`, and it no longer counts among its key's requests when its last byte is sent.
"""

import inspect
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.dependencies import Services, services_of
from server.api.error_responses import ApiError, as_api_error, internal_error
from server.api.route_table import Route, match, routes_at
from server.auth.keys import ANONYMOUS, Caller
from server.errors import EngineUnavailableError, ForbiddenError, InvalidKeyError, ServerError
from server.inference.request_context import RequestFacts

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499
SMALL_BODY_BYTES = 64 * 1024


class AccessControl:
    """Rejects requests that must not reach the app, by the app's services. clock: monotonic seconds."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock

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
                await self._app(cycle.scope, receive, cycle.send)
            else:
                await rejection(cycle.scope, receive, cycle.send)
        except Exception as error:
            if not cycle.status:
                response = await _unforeseen(cycle.scope, error, cycle.request_id)
                await response(cycle.scope, receive, cycle.send)
            raise
        finally:
            cycle.end()


class _RequestCycle:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, services: Services | None, clock: Callable[[], float]) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.method: str = scope["method"]
        self.route: Route | None = None
        self.caller = ANONYMOUS
        self.facts = RequestFacts()
        self.status = 0
        self._headers, self._send, self._services, self._clock = headers, send, services, clock
        self._began = clock()
        self._leave: Callable[[], None] | None = None
        self.scope = self._inner_scope(scope)

    def _inner_scope(self, scope: Scope) -> Scope:
        """The app's scope: with the request ID as a header, and a GET in place of a HEAD."""
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": self.request_id, "facts": self.facts, "caller": self.caller}
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        return {
            **scope,
            "method": "GET" if self.method == "HEAD" else self.method,
            "headers": [*others, (b"x-request-id", self.request_id.encode())],
        }

    def admit(self) -> Response | None:
        """The response to a request that is rejected; None if the app gets it."""
        path, root_path = self.scope["path"], self.scope.get("root_path", "")
        self.route = match(self.method, path, root_path)
        if self._services is not None:  # for the log of a rejected request
            given = self._headers.get("authorization"), self._headers.get("x-api-key")
            self.caller = self._services.keys.identify(*given) or ANONYMOUS
        try:
            if self.route is None:
                return _no_route(self.method, path, root_path)
            self._enter(self.route)
        except (ServerError, ApiError) as error:
            response = as_api_error(error).response()
            if response.status_code == 401:
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
        services = self._services
        if services is None:
            if route.path != "/health":
                raise EngineUnavailableError("the server is starting; retry in a few seconds", retry_after_s=5)
            return
        if route.need == "metrics" and not services.is_metrics_route_open:
            raise _not_found()
        client = (self.scope.get("client") or (None,))[0]
        caller = caller_of(services, route, self._headers)
        self.caller = replace(caller, client=client, request_id=self.request_id)
        if route.selects_model and not self.caller.is_admin:
            limits, label = services.rate_limits, self.caller.label
            limits.enter(label)
            self._leave = lambda: limits.leave(label)

    async def send(self, message: Message) -> None:
        """Send a message of the response, with the request ID; for a HEAD only the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message.setdefault("headers", [])  # ASGI lets an app leave them out
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
        if self._services is not None:
            path = None if self.route is None else self.route.path
            status, seconds = self.status or _CLIENT_LEFT, self._clock() - self._began
            label = self.caller.label
            self._services.access_log.write(self.request_id, label, self.method, path, status, seconds, self.facts)

    def _free(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def caller_of(services: Services, route: Route, headers: Headers) -> Caller:
    """The caller of a request. Raises InvalidKeyError or ForbiddenError if the route needs more than the request
    has."""
    keys = services.keys
    given = headers.get("authorization"), headers.get("x-api-key")
    known = keys.identify(*given)
    if route.need == "none":
        return known or ANONYMOUS
    if route.need == "metrics" and keys.may_read_metrics(*given):
        return known or ANONYMOUS
    if known is not None and (known.is_admin or route.need == "inference"):
        return known
    if _needs_key(services, route, known):
        raise _wrong_key(route, known, any(given))
    plain = {name: headers.getlist(name) for name in headers}
    is_inference = route.need == "inference"
    problem = services.origin.page_problem(plain) if is_inference else services.origin.local_problem(plain)
    if problem:
        raise ForbiddenError(f"{route.method} {route.path}: {problem}")
    return Caller(known.label if known else None, route.need == "admin")


def _needs_key(services: Services, route: Route, known: Caller | None) -> bool:
    """Whether a key is missing: the one that the route needs, or any if the server has some."""
    if known is None and services.keys.needs_key:
        return True
    if route.need == "inference":
        return False
    return services.keys.has_admin or (route.need == "metrics" and services.keys.has_metrics_key)


def _wrong_key(route: Route, known: Caller | None, is_given: bool) -> ServerError:
    if known is not None:
        return ForbiddenError(f"found the key {known.label!r}, expected the {route.need} key for {route.path}")
    found = "an unknown key" if is_given else "no key"
    return InvalidKeyError(
        f"found {found}, expected the header `Authorization: Bearer KEY` with one of this server's keys"
    )


def _no_route(method: str, path: str, root_path: str) -> Response:
    """404 for a path that is not listed, 405 for a method that its routes do not have, 204 for OPTIONS."""
    allowed = {route.method for route in routes_at(path, root_path)}
    if not allowed:
        raise _not_found()
    allow = {"Allow": ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))}
    if method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    error = ApiError(405, "method_not_allowed", f"found {method[:16]}, expected one of {allow['Allow']}")
    response = error.response()
    response.headers.update(allow)
    return response


async def _unforeseen(scope: Scope, error: Exception, request_id: str) -> Response:
    """The app's own response to an unforeseen error, sent here so that it carries the request ID."""
    handler = scope["app"].exception_handlers.get(Exception)
    if handler is None:
        return internal_error(request_id).response()
    answer = handler(Request(scope), error)
    response: Response = await answer if inspect.isawaitable(answer) else answer
    return response


def _not_found() -> ApiError:
    return ApiError(404, "not_found", "found no such route; GET /openapi.json lists the routes of this server")
