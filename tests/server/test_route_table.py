"""Default deny: the list against vLLM's real app, and against paths that try to be read two ways."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.routing import Mount
from starlette.routing import Route as PathRoute
from starlette.types import Receive, Scope, Send

from server.api.route_table import ROUTES, Need, Route, match, missing, prune, routes_at
from tests.server import fake_server
from tests.server.fakes import FakeEngine

# Attached by the server itself, not by vLLM.
OURS = ("/v1/adapters", "/metrics", "/ready", "/v1/models/")


@pytest.fixture(scope="module")
def build() -> Callable[[], FastAPI]:
    """vLLM's own app, without an engine and without our routes."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_PLUGINS", "none")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["model"])
        apps = [build_app(args, ("generate",), None) for _ in range(3)]
    return apps.pop


def paths(app: FastAPI) -> set[tuple[str, str]]:
    return {(method, route.path) for route in app.routes for method in route.methods or ()}  # type: ignore[attr-defined]


def test_of_vllms_app_only_what_is_listed_stays_and_all_of_it_is_there(build: Callable[[], FastAPI]) -> None:
    app = build()
    before = len(app.routes)
    prune(app)
    listed = {(route.method, route.path) for route in ROUTES}
    assert paths(app) - {("HEAD", "/openapi.json")} <= listed and len(app.routes) < before - 15
    assert [route.path for route in missing(app) if not route.path.startswith(OURS)] == []


@pytest.mark.parametrize(
    "path",
    [
        "/load",
        "/kv_event_sources",
        "/v1/systemone",
        "/ping",
        "/invocations",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/generative_scoring",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
        "/docs",
        "/redoc",
        "/docs/oauth2-redirect",
        "/metrics",
    ],
)
def test_routes_of_vllm_that_are_taken_away(path: str, vllm_app: tuple[set[str], set[str]]) -> None:
    before, after = vllm_app
    assert path in before, "vLLM has no such route: strike it from this test"
    assert path not in after


@pytest.fixture(scope="module")
def vllm_app(build: Callable[[], FastAPI]) -> tuple[set[str], set[str]]:
    app = build()
    before = {route.path for route in app.routes}  # type: ignore[attr-defined]
    prune(app)
    return before, {route.path for route in app.routes}  # type: ignore[attr-defined]


def test_vllms_metrics_stay_if_asked(build: Callable[[], FastAPI]) -> None:
    app = build()
    prune(app, keep_vllm_metrics=True)
    kept = [route for route in app.routes if getattr(route, "path", None) == "/metrics"]
    assert {type(route).__name__ for route in kept} == {"APIRoute", "Mount"}


async def _asgi(scope: Scope, receive: Receive, send: Send) -> None: ...


async def _endpoint() -> None: ...


async def _websocket(socket: WebSocket) -> None: ...


def _app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", _endpoint, methods=["GET"])
    app.add_api_route("/metrics", _endpoint, methods=["GET"])
    return app


ADDED: dict[str, Callable[[FastAPI], object]] = {
    "unlisted path": lambda app: app.add_api_route("/v1/embeddings", _endpoint, methods=["POST"]),
    "unlisted method": lambda app: app.add_api_route("/health", _endpoint, methods=["PUT"]),
    "two methods, one listed": lambda app: app.add_api_route("/health", _endpoint, methods=["GET", "POST"]),
    "another case": lambda app: app.add_api_route("/Health", _endpoint, methods=["GET"]),
    "a trailing slash": lambda app: app.add_api_route("/health/", _endpoint, methods=["GET"]),
    "a wider parameter": lambda app: app.add_api_route("/v1/adapters/{name:path}", _endpoint, methods=["GET"]),
    "a mount": lambda app: app.mount("/static", StaticFiles(directory="/tmp")),
    "a mount on a listed path": lambda app: app.mount("/health", _asgi),
    "a mount on everything": lambda app: app.mount("", _asgi),
    "vLLM's mount of metrics": lambda app: app.routes.append(Mount("/metrics", _asgi)),
    "a websocket": lambda app: app.add_api_websocket_route("/v1/realtime", _websocket),
    "a websocket on a listed path": lambda app: app.add_api_websocket_route("/health", _websocket),
    "an ASGI route of every method": lambda app: app.routes.append(PathRoute("/health", _Asgi())),
}


class _Asgi:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


@pytest.mark.parametrize("added", ADDED)
def test_an_added_route_that_is_not_listed_is_removed(added: str) -> None:
    app = _app()
    routes = list(app.routes)
    ADDED[added](app)
    assert len(app.routes) == len(routes) + 1
    prune(app)
    assert app.routes == routes


def test_names_of_parameters_do_not_matter() -> None:
    app, router = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), APIRouter()
    router.add_api_route("/v1/adapters/{adapter}/versions/{n}", _endpoint, methods=["GET", "DELETE"])
    app.include_router(router)
    prune(app)
    assert len(app.routes) == 1
    assert ("GET", "/v1/adapters/{name}/versions/{version}") not in {(r.method, r.path) for r in missing(app)}
    assert ("GET", "/v1/adapters/{name}") in {(r.method, r.path) for r in missing(app)}


def test_an_app_without_its_openapi_document_lacks_nothing_else() -> None:
    lacking = {(route.method, route.path) for route in missing(_app())}
    assert lacking == {(r.method, r.path) for r in ROUTES} - {
        ("GET", "/openapi.json"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    }


def test_a_path_is_listed_once_and_matches_one_template() -> None:
    assert len({route.key for route in ROUTES}) == len(ROUTES)
    for route in ROUTES:
        path = route.path.replace("{version}", "1").replace("{file}", "config").replace("{name}", "poet")
        assert {found.path for found in routes_at(path.replace("{model:path}", "poet@3"))} == {route.path}


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", "none"),
        ("HEAD", "/health", "none"),
        ("GET", "/metrics", "metrics"),
        ("GET", "/v1/models/org/model@3", "inference"),
        ("POST", "/v1/completions", "inference"),
        ("GET", "/v1/adapters", "inference"),
        ("GET", "/v1/adapters/poet", "inference"),
        ("GET", "/v1/adapters/poet/versions/3", "inference"),
        ("GET", "/v1/adapters/poet/versions/3/files/weights", "admin"),
        ("HEAD", "/v1/adapters/poet/versions/3/files/weights", "admin"),
        ("POST", "/v1/adapters", "admin"),
        ("PATCH", "/v1/adapters/poet", "admin"),
        ("DELETE", "/v1/adapters/poet", "admin"),
        ("DELETE", "/v1/adapters/poet/versions/3", "admin"),
    ],
)
def test_what_a_request_needs(method: str, path: str, expected: Need) -> None:
    found = match(method, path)
    assert found is not None and found.need == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "TRACE", "OPTIONS", "get", "", "CONNECT"])
def test_a_method_that_is_not_listed_matches_nothing(method: str) -> None:
    assert match(method, "/health") is None and routes_at("/health")


# As in an ASGI scope: percent-encoding is undone already, so %2F is a slash here.
NASTY = [
    *("", "/", "//health", "/health/", "/health//", "/Health", "/HEALTH", "/./health", "/x/../health", " /health"),
    *("/health?x", "/health#x", "/health;x", "/health\x00", "/health ", "/health\n\n", "health", "/%68ealth"),
    *("/v1/adapters/", "//v1/adapters", "/v1//adapters", "/v1/adapters//", "/v1/adapters//versions/1"),
    *("/v1/adapters/a/../b", "/v1/adapters/a/versions", "/v1/adapters/a/versions/", "/v1/adapters/a/versions/1/"),
    *("/v1/adapters/a/b/versions/1", "/v1/adapters/a/versions/1/files/x/y", "/v1/Adapters", "/V1/adapters"),
    *("/v1/completions/", "/v1/chat/completions/../../metrics", "/v1/responses/x", "/v1", "/v1/models/../../load"),
    *("/metrics/", "/metrics/x", "/metricsx", "/v1/adapters/a/versions/1/files/config\n", "/health\n", "/v1/models/"),
    *("/v1\\adapters", "/v1/adapters/..", "/v1/adapters/.", "/v1/adapters/a%2Fversions", "/v1/adapters/{name}"),
]


@pytest.mark.parametrize("root_path", ["", "/prefix", "/v1"])
@pytest.mark.parametrize("path", NASTY)
def test_a_path_means_here_what_it_means_to_the_router(path: str, root_path: str) -> None:
    """Every route of the list as a route of an app: the app's own router says which one it would take."""
    for full in {path, root_path + path}:
        for method in ("GET", "POST", "DELETE"):
            found = match(method, full, root_path)
            assert (found and found.path) == _routed(method, full, root_path), (method, full)


def _routed(method: str, path: str, root_path: str) -> str | None:
    scope: Scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": []}
    for route in _LISTED.routes:
        if route.matches(scope)[0].name == "FULL":
            assert isinstance(route, PathRoute)
            return route.path
    return None


_LISTED = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
for _route in ROUTES:
    _LISTED.add_api_route(_route.path, _endpoint, methods=[_route.method])


def test_no_nasty_path_reaches_what_needs_less_than_it_should() -> None:
    for path in NASTY:
        found = match("GET", path)
        if found is not None and "adapters" in path and not path.startswith("/v1/models"):
            assert found.path.startswith("/v1/adapters"), path


def test_the_prefix_of_a_proxy_is_taken_off() -> None:
    assert match("GET", "/prefix/health", "/prefix") == match("GET", "/health")
    assert match("GET", "/prefixhealth", "/prefix") is None
    assert match("GET", "/prefix/health") is None


def test_the_marks_of_the_list() -> None:
    generating = {route.path for route in ROUTES if route.generates}
    assert generating == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    selecting = {route.path for route in ROUTES if route.selects_model}
    assert selecting == generating | {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}
    assert {(r.method, r.path) for r in ROUTES if r.changes} == {
        ("POST", "/v1/adapters"),
        ("PATCH", "/v1/adapters/{name}"),
        ("DELETE", "/v1/adapters/{name}"),
        ("DELETE", "/v1/adapters/{name}/versions/{version}"),
    }


def test_routes_compare_by_what_they_are() -> None:
    route = Route("GET", "/health", "none", answers_early=True)
    assert route == ROUTES[0] and hash(route) == hash(ROUTES[0]) and replace(route, need="admin") != route


def test_no_request_waits_for_a_thread_because_of_what_its_route_depends_on(tmp_path: Path) -> None:
    """FastAPI runs a dependency that is a plain function on a thread: two switches of threads beside a busy engine."""

    def calls(dependant: Dependant) -> Iterator[Any]:
        yield dependant.call
        for each in dependant.dependencies:
            yield from calls(each)

    app = fake_server.build_app(fake_server.settings_of(tmp_path / "store"), FakeEngine())
    found = {call for route in app.routes if isinstance(route, APIRoute) for call in calls(route.dependant)}
    ours = {call for call in found if (call.__module__ or "").startswith("server.")}
    assert len(ours) > 20
    assert [call for call in ours if not iscoroutinefunction(call)] == []
