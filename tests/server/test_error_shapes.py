"""Every error of every route has its route's shape, a documented code and no words of the inside, whoever found it.

The routes are walked as the route table has them, over vLLM's own app and handlers (tests/server/vllm_app).
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi.routing import APIRoute
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.api.error_responses import ANTHROPIC_TYPES
from server.api.route_table import ROUTES, Route
from server.app import serving_log
from tests.server import tiny_server
from tests.server.fake_server import bearer, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.server.test_error_table import DOCUMENTED
from tests.server.tiny_server import BASE_NAME
from tests.server.vllm_app import World, running
from tests.synthetic import write_adapter

SELECTING = [route for route in ROUTES if route.selects_model]
GENERATING = [route for route in ROUTES if route.generates]
SECRET = "/root/models/secret.py"
INSIDE = ("Traceback", ".py", "<class", "validation error", "pydantic", "VLLM_", "vllm.", "0x", "input_value", SECRET)
"""What no message may have."""
CONTENT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "t3 t4"}]},
    "/v1/completions": {"prompt": "t3 t4"},
    "/v1/responses": {"input": "t3 t4"},
    "/v1/messages": {"messages": [{"role": "user", "content": "t3 t4"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "t3 t4"}]},
    "/tokenize": {"prompt": "t3 t4"},
    "/detokenize": {"tokens": [3, 4]},
}


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


@dataclass
class Asker:
    """Requests to one app, from outside of its loop."""

    portal: BlockingPortal
    world: World

    def ask(self, method: str, path: str, key: str | None = "alice", **options: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.world.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                headers = ({} if key is None else bearer(key)) | options.pop("headers", {})
                return await client.request(method, path, headers=headers, **options)

        return self.portal.call(request)

    def post(self, route: Route, model: str = BASE_NAME, **changes: Any) -> httpx.Response:
        return self.ask("POST", route.path, json={"model": model} | CONTENT[route.path] | changes)

    def ask_route(self, route: Route, key: str | None) -> httpx.Response:
        """A request without a body to a route, with names in its path that are not there."""
        path = route.path.replace(":path", "").format(name="nobody", version="1", file="weights", model="nobody")
        return self.ask(route.method, path, key)


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("shapes")
    model = tiny_server.build_model(folder / "model")
    settings = settings_of(folder / "store", metrics_key="metrics-has-a-key-of-some-length")
    made = write_adapter(folder / "adapter", BASE, 1)
    files = {"config": (made / CONFIG_FILE).read_bytes(), "weights": (made / WEIGHTS_FILE).read_bytes()}
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(model, settings, FakeEngine())) as world,
    ):
        asker = Asker(portal, world)
        answer = asker.ask("POST", "/v1/adapters", "admin", data={"name": "poet"}, files=files)
        assert answer.status_code == 201, answer.text
        yield asker


def check(body: Any, route: Route, status: int) -> dict[str, Any]:
    """The error object of a body, which has the shape of the route's dialect."""
    error: dict[str, Any] = body["error"]
    if route.dialect == "anthropic":
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error" and body["request_id"]
        otherwise = "invalid_request_error" if status < 500 else "api_error"
        assert error["type"] == ANTHROPIC_TYPES.get(status, otherwise)
    else:
        assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert set(error) - {"violations"} == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str) and DOCUMENTED[error["code"]] == status, error
    assert error["param"] is None or isinstance(error["param"], str)
    assert 0 < len(error["message"]) <= 1100 and "\n" not in error["message"]
    assert not [word for word in INSIDE if word in error["message"]], error["message"]
    return error


def refused(response: httpx.Response, route: Route, status: int, code: str) -> dict[str, Any]:
    """The error of a response, which must be this one."""
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    if route.dialect == "anthropic":
        assert response.headers["request-id"] == response.json()["request_id"] == response.headers["x-request-id"]
    assert response.status_code == status, response.text
    error = check(response.json(), route, status)
    assert error["code"] == code, error
    if status in (429, 503) and code != "adapter_unavailable":
        assert int(response.headers["retry-after"]) > 0
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_the_document_of_vllms_routes_has_our_errors_and_keys(asker: Asker) -> None:
    document = asker.ask("GET", "/openapi.json").json()
    assert document["info"]["title"] == "perft-server"
    for route in SELECTING:
        operation = document["paths"][route.path]["post"]
        assert operation["security"] == [{"key": []}, {"x-api-key": []}] and "422" not in operation["responses"]
        errors = {s: said for s, said in operation["responses"].items() if s >= "400"}
        assert set(errors) >= {"400", "401", "403", "404", "429", "500", "503"}
        name = "AnthropicErrorObject" if route.dialect == "anthropic" else "ErrorObject"
        assert name in document["components"]["schemas"]
        for said in errors.values():
            assert said["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")


def test_the_location_of_an_upload_has_the_root_path(asker: Asker, tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "adapter", BASE, 2)
    files = {"config": (made / CONFIG_FILE).read_bytes(), "weights": (made / WEIGHTS_FILE).read_bytes()}
    app = asker.world.app
    app.root_path = "/models/a"
    try:
        answer = asker.ask("POST", "/models/a/v1/adapters", "admin", data={"name": "clerk"}, files=files)
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"].startswith("/models/a/v1/adapters/clerk")
        assert asker.ask("GET", answer.headers["location"]).status_code == 200
        (route,) = (route for route in ROUTES if route.path == "/v1/messages")
        refused(asker.ask("POST", "/models/a/v1/messages", None), route, 401, "invalid_api_key")
    finally:
        app.root_path = ""
        asker.ask("DELETE", "/v1/adapters/clerk", "admin")


# Before any route


@pytest.mark.parametrize("route", [route for route in ROUTES if route.need != "none"], ids=name_of)
@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Bearer wrong-key-0123456789"}, {"x-api-key": "wrong-key-0123"}]
)
def test_without_a_known_key(asker: Asker, route: Route, header: dict[str, str]) -> None:
    path = route.path.replace(":path", "").format(name="poet", version="1", file="weights", model="poet")
    error = refused(asker.ask(route.method, path, None, headers=header), route, 401, "invalid_api_key")
    assert "wrong-key" not in error["message"]


@pytest.mark.parametrize("route", [r for r in ROUTES if r.need in ("admin", "metrics")], ids=name_of)
def test_without_the_right(asker: Asker, route: Route) -> None:
    refused(asker.ask_route(route, "alice"), route, 403, "forbidden")


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_a_method_that_is_not_there(asker: Asker, route: Route) -> None:
    path = route.path.replace(":path", "").format(name="poet", version="1", file="weights", model="poet")
    response = asker.ask("PUT", path)
    refused(response, route, 405, "method_not_allowed")
    assert route.method in response.headers["allow"]


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_a_path_below_that_is_not_there(asker: Asker, route: Route) -> None:
    if route.path not in ("/v1/models", "/v1/models/{model:path}", "/v1/messages"):
        path = route.path.format(name="poet", version="1", file="weights") + "/no/such/path"
        refused(asker.ask(route.method, path), route, 404, "not_found")
    refused(asker.ask("POST", "/v1/messages/batches"), SELECTING[3], 404, "not_found")


@pytest.mark.parametrize("route", [route for route in ROUTES if route.path != "/health"], ids=name_of)
def test_while_the_server_starts(asker: Asker, route: Route) -> None:
    services, asker.world.app.state.services = asker.world.app.state.services, None
    try:
        refused(asker.ask_route(route, "admin"), route, 503, "engine_unavailable")
    finally:
        asker.world.app.state.services = services


@pytest.mark.parametrize("route", [r for r in ROUTES if r.path not in ("/health", "/metrics")], ids=name_of)
def test_while_the_server_ends(asker: Asker, route: Route) -> None:
    lifecycle = asker.world.app.state.services.lifecycle
    lifecycle.is_draining = True
    try:
        response = asker.ask_route(route, "admin")
        refused(response, route, 503, "engine_unavailable")
        assert response.headers["connection"] == "close"
    finally:
        lifecycle.is_draining = False


def test_names_that_are_not_there(asker: Asker) -> None:
    for route in ROUTES:
        if "{name}" in route.path and route.method != "PATCH":
            error = refused(asker.ask_route(route, "admin"), route, 404, "adapter_not_found")
            assert error["param"] == "name"
        if "{model" in route.path:
            assert refused(asker.ask_route(route, "alice"), route, 404, "model_not_found")["param"] == "model"


ELSEWHERE = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}


def test_a_page_of_another_site_is_refused_in_our_shape(asker: Asker) -> None:
    for route in SELECTING:
        response = asker.ask("OPTIONS", route.path, None, headers=ELSEWHERE | {"x-request-id": "mine"})
        error = refused(response, route, 403, "forbidden")
        assert error["param"] == "Origin" and "--allowed-origins" in error["message"]
        assert response.headers["x-request-id"] == "mine" and "access-control-allow-origin" not in response.headers
        assert response.headers["x-content-type-options"] == "nosniff"
    assert asker.ask("OPTIONS", "/v1/completions", None).status_code == 204


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("GET", "/nix", ("GET /nix", "/openapi.json")),
        ("POST", "/chat/completions", ("POST /chat/completions", "base_url ends in /v1")),
        ("POST", "/v1/v1/chat/completions", ("/v1/v1/chat/completions", "/v1 twice")),
        ("POST", "/v1/v1/messages", ("/v1/v1/messages", "without /v1")),
        *(("POST", f"/v1/{name}", (f"does not serve OpenAI's /v1/{name}",))
          for name in ("embeddings", "files", "images", "audio", "moderations", "batches")),
        ("POST", "/v1/audio/speech", ("does not serve OpenAI's /v1/audio",)),
        ("POST", "/embeddings", ("does not serve OpenAI's /v1/embeddings",)),
        ("GET", "/v1/responses/resp_1", ("not stored",)),
        ("GET", "/a%0a%1b\u00e9", ("GET /a%0A%1B%C3%A9",)),
        ("GET", "/" + "x" * 3000, ("...",)),
    ],
)  # fmt: skip
def test_a_route_that_is_not_there_says_which_and_what_to_do(
    asker: Asker, method: str, path: str, said: tuple[str, ...]
) -> None:
    message = refused(asker.ask(method, path), ROUTES[0], 404, "not_found")["message"]
    assert all(words in message for words in said), message
    assert len(message) < 500


def test_names_that_cannot_be(asker: Asker) -> None:
    for path, status, code in (
        ("/v1/adapters/A B", 404, "adapter_not_found"),
        ("/v1/adapters/poet/versions/x", 404, "version_not_found"),
        ("/v1/adapters?after=A!", 400, "invalid_request"),
    ):
        message = refused(asker.ask("GET", path), ROUTES[0], status, code)["message"]
        assert "found " in message and not any(
            word in message for word in ("String", "string", "Value error", "pattern")
        )
        assert "a number from 1" in message if "versions" in path else "1 to 63 characters" in message


# Bodies


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"model": }', b"[" * 5000, b"\xff\xfe{}"])
def test_what_is_no_json_object(asker: Asker, route: Route, body: bytes) -> None:
    response = asker.ask("POST", route.path, content=body, headers={"content-type": "application/json"})
    refused(response, route, 400, "invalid_request")


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_a_model_that_is_none(asker: Asker, route: Route) -> None:
    for wrong in (None, "", 7, ["poet"], {}, True):
        error = refused(asker.post(route, model=wrong), route, 400, "invalid_request")  # type: ignore[arg-type]
        assert error["param"] == "model"
    for unknown in ("nobody", "poet@99", "poet@", "../x"):
        assert refused(asker.post(route, model=unknown), route, 404, "model_not_found")["param"] == "model"


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_a_body_over_the_limit(asker: Asker, route: Route) -> None:
    limit = asker.world.app.state.services.bodies.limits.body_bytes
    response = asker.ask("POST", route.path, content=b'{"x": "' + b"a" * limit + b'"}')
    refused(response, route, 413, "request_too_large")


WRONG: tuple[Any, ...] = ({"?": [None]}, [{"?": 1}], "?", -3, 1e300, True, [[]])


def fields_of(asker: Asker, route: Route) -> list[str]:
    """The fields of the bodies that a route of vLLM's app takes."""
    found: set[str] = set()
    for there in asker.world.app.routes:
        if isinstance(there, APIRoute) and there.path == route.path and there.body_field is not None:
            kinds = [there.body_field.field_info.annotation]
            while kinds:
                kind = kinds.pop()
                kinds += getattr(kind, "__args__", ())
                found |= {f.alias or name for name, f in getattr(kind, "model_fields", {}).items()}
    assert "model" in found
    return sorted(found - {"model"})


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_a_value_of_a_wrong_type_in_any_field(asker: Asker, route: Route) -> None:
    """Refused by the name of the field, or fine; never an error of the server's."""
    named, fields = 0, fields_of(asker, route)
    for field in fields:
        for wrong in WRONG:
            for stream in (False, True) if route.generates and field != "stream" else (False,):
                options = {"stream": True} if stream else {}
                response = asker.post(route, **{field: wrong}, **options)
                if response.status_code == 200:
                    continue
                code = response.json()["error"]["code"]
                error = refused(response, route, DOCUMENTED[code], code)
                assert response.status_code in (400, 404, 413), (field, wrong, error)
                assert error["param"] is None or error["param"].split(".")[0] in fields, (field, wrong, error)
                named += error["param"] is not None and error["param"].split(".")[0] == field
    assert named > len(fields)


LONG = "t3 " * 400


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"temperature": -1}, "invalid_request", "temperature"),
        ({"temperature": "hot"}, "invalid_request", "temperature"),
        ({"top_p": 7}, "invalid_request", "top_p"),
        ({"content": LONG}, "context_length_exceeded", "content"),
        ({"content": "t3 " * 384}, "context_length_exceeded", "content"),
        ({"content": "t3 " * 383 + "t4"}, "context_length_exceeded", "content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_vllm_refuses(
    asker: Asker, route: Route, stream: bool, changes: dict[str, Any], code: str, param: str
) -> None:
    (content,) = CONTENT[route.path].keys() - {"max_tokens"}
    if "content" in changes:
        text = changes["content"]
        changes = {content: [{"role": "user", "content": text}] if content == "messages" else text}
    response = asker.post(route, stream=stream, **changes)
    assert refused(response, route, 400, code)["param"] == (content if param == "content" else param)


# The engine


@contextmanager
def before(asker: Asker, act: Callable[[int], Any]) -> Iterator[None]:
    """`act` is called before every token of an answer, with its number."""
    client = asker.world.client
    client.before = act
    try:
        yield
    finally:
        client.before, client.dead = lambda number: None, None


def raising(asker: Asker, error: Exception, at: int) -> Callable[[int], None]:
    def act(number: int) -> None:
        if number == at and isinstance(error, EngineDeadError):
            asker.world.client.dead = error
        elif number == at:
            raise error

    return act


INSIDE_ERRORS = [
    (RuntimeError(SECRET), 500, "internal_error"),
    (EngineGenerateError(SECRET), 500, "internal_error"),
    (EngineDeadError(), 503, "engine_unavailable"),
]


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize(("error", "status", "code"), INSIDE_ERRORS, ids=str)
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_of_the_engines(asker: Asker, route: Route, error: Exception, status: int, code: str, at: int) -> None:
    with before(asker, raising(asker, error, at)):
        refused(asker.post(route), route, status, code)
    with before(asker, raising(asker, error, at)):
        response = asker.post(route, stream=True)
    if at == 0 and route.dialect != "responses":  # which has events before the first token
        refused(response, route, status, code)
    else:
        last = events(response)[-1]
        if route.dialect == "responses":
            flat = {name: last.pop(name) for name in ("type", "sequence_number", "code", "message", "param")}
            assert flat["type"] == "error" and flat["code"] == code and isinstance(flat["sequence_number"], int)
            assert flat["sequence_number"] == len(events(response)) - 1
        assert check(last, route, status)["code"] == code
        assert ("event: error\ndata: " in response.text) == (route.dialect != "openai")
        assert SECRET not in response.text and response.text.endswith("\n\n")


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
def test_a_dead_engine(asker: Asker, route: Route) -> None:
    asker.world.client.dead = EngineDeadError()
    try:
        for stream in (False, True):
            response = asker.post(route, stream=stream)
            if response.status_code == 200:
                last = events(response)[-1]
                assert last["code"] == "engine_unavailable"
            else:
                refused(response, route, 503, "engine_unavailable")
    finally:
        asker.world.client.dead = None


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize("at", [0, 2])
def test_an_adapter_that_is_deleted_meanwhile(asker: Asker, route: Route, at: int) -> None:
    registry = asker.world.app.state.services.registry
    (version,) = registry.versions("poet")

    def delete(number: int) -> None:
        if number == at:
            version.is_deleted = True
            asker.world.client.aborted |= {"*"}

    for stream in (False, True):
        try:
            with before(asker, delete):
                response = asker.post(route, model="poet", stream=stream)
        finally:
            version.is_deleted = False
            asker.world.client.aborted.clear()
        if response.status_code == 200:
            last = events(response)[-1]
            assert (last["error"]["code"], last["error"]["param"]) == ("adapter_deleted", "model")
        else:
            assert refused(response, route, 410, "adapter_deleted")["param"] == "model"


# The log


def test_our_warnings_are_written_whatever_a_library_sets(asker: Asker, caplog: pytest.LogCaptureFixture) -> None:
    assert all(logging.getLogger(f"{name}.x").isEnabledFor(logging.WARNING) for name in serving_log.OURS)
    (route,) = (route for route in GENERATING if route.path == "/v1/completions")
    with before(asker, raising(asker, EngineDeadError(), 1)):
        response = asker.post(route)
    assert response.status_code == 503
    assert any(response.headers["x-request-id"] in record.getMessage() for record in caplog.records)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What vLLM's logger writes."""
    stream, logger = io.StringIO(), logging.getLogger("vllm")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    serving_log.install()
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_mistake_leaves_no_traceback(asker: Asker, log: io.StringIO, route: Route, stream: bool) -> None:
    for changes in ({"temperature": -1}, {"top_k": -7}, {"temperature": "hot"}, {"tools": [{"type": "function"}]}):
        response = asker.post(route, stream=stream, **changes)
        assert response.status_code in (200, 400)
    registry = asker.world.app.state.services.registry
    (version,) = registry.versions("poet")
    assert version.id and "Traceback" not in log.getvalue(), log.getvalue()


def test_an_error_of_our_own_keeps_its_traceback_with_the_request(asker: Asker, log: io.StringIO) -> None:
    for path in ("/v1/messages", "/v1/chat/completions", "/v1/completions"):
        (route,) = (route for route in GENERATING if route.path == path)
        with before(asker, raising(asker, RuntimeError(SECRET), 2)):
            response = asker.post(route, stream=True)
        assert "Traceback" in log.getvalue() and SECRET in log.getvalue()
        assert response.headers["x-request-id"] in log.getvalue()
