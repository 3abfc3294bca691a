"""Owns the one list of routes and the key that each needs. What is not on it does not exist (default deny).

Invariant: a request is matched by Starlette's own matcher, so the route checked here is the one that the router runs.
Left out on purpose: stored responses (GET and cancel of /v1/responses/{id} know no owner), /docs and /redoc (they run
another site's script on this origin), and whatever generates without our handling of model and salt.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.routing import Route as PathRoute
from starlette.types import Scope

from server.auth.keys import Need

Dialect = Literal["openai", "responses", "anthropic"]
"""The API whose clients a route serves: it decides the shape of errors, in a response and in a stream."""
_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*")


def _never(request: Request) -> Response:
    raise AssertionError(f"{request.url.path}: these routes only match")


@dataclass(frozen=True)
class Route:
    """One method of one path.

    generates: its body gets a cache salt. selects_model: its JSON body's `model` selects an adapter. answers_early:
    also while the server is starting.
    """

    method: str
    path: str
    need: Need
    generates: bool = False
    selects_model: bool = False
    dialect: Dialect = "openai"
    answers_early: bool = False
    _matcher: PathRoute = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_matcher", PathRoute(self.path, _never, methods=[self.method]))

    @property
    def changes(self) -> bool:
        """Whether it changes adapters."""
        return self.need == "admin" and self.method != "GET"

    @property
    def is_upload(self) -> bool:
        """Whether its body is an upload, which has its own limits."""
        return (self.method, self.path) == ("POST", "/v1/adapters")

    @property
    def key(self) -> tuple[str, str]:
        """What makes two routes the same: parameters count by position, not by name."""
        return self.method, _PARAMETER.sub("{", self.path)

    def matches(self, scope: Scope) -> bool:
        """Whether the path is this route's, whatever the method."""
        return self._matcher.matches(scope)[0] is not Match.NONE


def _adapter_routes() -> list[Route]:
    adapter = "/v1/adapters/{name}"
    version = adapter + "/versions/{version}"
    return [
        Route("GET", "/v1/adapters", "inference"),
        Route("POST", "/v1/adapters", "admin"),
        Route("GET", adapter, "inference"),
        Route("PATCH", adapter, "admin"),
        Route("DELETE", adapter, "admin"),
        Route("GET", version, "inference"),
        Route("DELETE", version, "admin"),
        Route("GET", version + "/files/{file}", "admin"),
    ]


def _generating(path: str, dialect: Dialect = "openai") -> Route:
    return Route("POST", path, "inference", generates=True, selects_model=True, dialect=dialect)


def _selecting(path: str, dialect: Dialect = "openai") -> Route:
    return Route("POST", path, "inference", selects_model=True, dialect=dialect)


ROUTES: tuple[Route, ...] = (
    Route("GET", "/health", "none", answers_early=True),
    Route("GET", "/ready", "none"),
    Route("GET", "/version", "none"),
    Route("GET", "/metrics", "metrics"),
    Route("GET", "/openapi.json", "inference"),
    Route("GET", "/v1/models", "inference"),
    Route("GET", "/v1/models/{model:path}", "inference"),
    _generating("/v1/chat/completions"),
    _generating("/v1/completions"),
    _generating("/v1/responses", "responses"),
    _generating("/v1/messages", "anthropic"),
    _selecting("/v1/messages/count_tokens", "anthropic"),
    _selecting("/tokenize"),
    _selecting("/detokenize"),
    *_adapter_routes(),
)


LOADING_ROUTES: tuple[Route, ...] = (
    Route("POST", "/v1/load_lora_adapter", "admin"),
    Route("POST", "/v1/unload_lora_adapter", "admin"),
)
"""Listed only where the operator allows sources of adapters (`more` below)."""
CONSOLE_ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "none", answers_early=True),
    Route("GET", "/console/session", "none"),
    Route("GET", "/console/metrics", "metrics"),
    Route("GET", "/console/{file:path}", "none", answers_early=True),
)
"""Listed unless the operator switches the console off. The first that matches counts, here and in the router."""


class Switches(Protocol):
    """The settings that add routes (server.settings)."""

    @property
    def adapter_sources(self) -> tuple[str, ...]: ...

    @property
    def console(self) -> bool: ...


def more_routes(switches: Switches | None) -> tuple[Route, ...]:
    """What is listed beside ROUTES. switches: None while the server is starting, when nothing is known to be off."""
    loading = LOADING_ROUTES if switches is None or switches.adapter_sources else ()
    return loading + (CONSOLE_ROUTES if switches is None or switches.console else ())


def routes_at(path: str, root_path: str = "", more: tuple[Route, ...] = ()) -> list[Route]:
    """The listed routes of a path (decoded, as in an ASGI scope), one per method."""
    scope: Scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path}
    return [route for route in ROUTES + more if route.matches(scope)]


def match(method: str, path: str, root_path: str = "", more: tuple[Route, ...] = ()) -> Route | None:
    """The listed route of a request; a HEAD is a GET without the body."""
    wanted = "GET" if method == "HEAD" else method
    return next((route for route in routes_at(path, root_path, more) if route.method == wanted), None)


def dialect_of(scope: Scope) -> Dialect:
    """The dialect of a request: of its route, or else of a route at its path or above it."""
    route: Route | None = scope.get("state", {}).get("route")
    if route is None:
        path, root_path = scope.get("path", ""), scope.get("root_path", "")
        below = (known for known in ROUTES if path.removeprefix(root_path).startswith(known.path + "/"))
        route = next(iter(routes_at(path, root_path)), None) or next(below, None)
    return "openai" if route is None else route.dialect


def prune(app: FastAPI, keep_vllm_metrics: bool = False, more: tuple[Route, ...] = ()) -> None:
    """Remove every route of the app that is not on the list, mounts, websockets and unknown kinds included.

    keep_vllm_metrics: keep vLLM's /metrics, a route and a mount; else only a plain /metrics route of ours.
    """
    app.router.routes[:] = [route for route in app.routes if _is_listed(route, keep_vllm_metrics, more)]
    app.openapi_schema = None


def missing(app: FastAPI, more: tuple[Route, ...] = ()) -> list[Route]:
    """The listed routes that the app does not have, except the OpenAPI document, which an operator may switch off."""
    there = {key for route in app.routes for key in _keys(route)}
    return [route for route in ROUTES + more if route.key not in there and route.path != "/openapi.json"]


def _is_listed(route: BaseRoute, keep_vllm_metrics: bool, more: tuple[Route, ...]) -> bool:
    if getattr(route, "path", None) == "/metrics" and _is_vllms_metrics(route):
        return keep_vllm_metrics
    listed = {known.key for known in ROUTES + more}
    keys = _keys(route)
    return bool(keys) and keys <= listed


def _is_vllms_metrics(route: BaseRoute) -> bool:
    endpoint = getattr(route, "endpoint", None)
    return isinstance(route, Mount) or getattr(endpoint, "__module__", "").startswith(
        "prometheus_fastapi_instrumentator"
    )


def _keys(route: BaseRoute) -> set[tuple[str, str]]:
    """A route of the app as keys of the list, without the HEAD of a GET; empty unless it is a plain route."""
    if not isinstance(route, PathRoute) or not route.methods:
        return set()
    methods = set(route.methods) - ({"HEAD"} if "GET" in route.methods else set())
    return {(method, _PARAMETER.sub("{", route.path)) for method in methods}
