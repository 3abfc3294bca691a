"""Access control and request origin: who may call which route, from where, and what every response carries."""

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Message, Scope
from starlette.websockets import WebSocketDisconnect

from server.api.route_table import ROUTES, Route
from server.auth.keys import KeyRing
from server.auth.origin import OriginPolicy, bind_problem, is_local_bind, is_loopback
from server.auth.proxies import TrustedProxies
from server.auth.rate_limits import RateLimits
from server.middleware.access_control import AccessControl
from server.middleware.access_log import AccessLog
from server.middleware.request_path import one_path
from server.settings.model import Settings
from tests.server.partial_services import partial_services

TEAM, OTHER, ADMIN, METRICS = "key-of-team-a", "key-of-team-b", "key-of-the-admin", "key-of-metrics"
LOCAL = "http://127.0.0.1:8000"
CHANGES = [route for route in ROUTES if route.changes]
FILES = next(route for route in ROUTES if route.path.endswith("/files/{file}"))


def path_of(route: Route) -> str:
    return re.sub(r"\{[^}]*\}", "1", route.path)


@dataclass
class Server:
    """Every listed route, answering with what access control found out, and the lines of the access log."""

    keys: KeyRing = field(default_factory=KeyRing)
    is_local: bool = True
    limits: RateLimits = field(default_factory=RateLimits)
    serves_metrics: bool = True
    is_started: bool = True
    base_url: str = LOCAL
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        self.stream = io.StringIO()
        for route in ROUTES:
            self.app.add_api_route(route.path, _answer, methods=[route.method], response_model=None)
        self.app.add_middleware(AccessControl)
        if self.is_started:
            log = AccessLog("json", self.stream)
            self.app.state.services = partial_services(
                keys=self.keys,
                origin=OriginPolicy(self.is_local),
                rate_limits=self.limits,
                access_log=log,
                metrics_address=None if self.serves_metrics else "127.0.0.1:9",
                settings=Settings(trusted_proxies=self.proxies),
            )
        self.client = TestClient(self.app, self.base_url, raise_server_exceptions=False)

    def ask(self, method: str, path: str, key: str | None = None, **headers: str) -> httpx.Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            given["authorization"] = f"Bearer {key}"
        return self.client.request(method, path, headers=given)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


async def _answer(request: Request) -> JSONResponse:
    if request.url.query == "boom":
        raise RuntimeError("boom")
    state = request.state
    if request.url.query == "facts":
        state.facts.adapter, state.facts.version, state.facts.generation_tokens = "poet", 3, 7
    return JSONResponse(
        {
            "label": state.caller.label,
            "is_admin": state.caller.is_admin,
            "route": state.route.path if hasattr(state, "route") else None,
            "client": [state.caller.client, state.caller.request_id],
            "request_id": state.request_id,
            "header": request.headers.getlist("x-request-id"),
        }
    )


def keyed(**changes: Any) -> Server:
    ring = KeyRing([("a", TEAM), ("b", OTHER)], ADMIN, METRICS)
    return Server(**({"keys": ring, "is_local": False, "base_url": "https://perft.example"} | changes))


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# --- keys


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_what_each_key_may(route: Route) -> None:
    """The whole table: route by route, with no key, a wrong one, and each of the right ones."""
    server = keyed()
    refused, allowed = (401, "invalid_api_key"), 200
    forbidden = (403, "forbidden")
    expected = {
        "none": [allowed] * 5,
        "inference": [refused, refused, allowed, allowed, refused],
        "admin": [refused, refused, forbidden, allowed, refused],
        "metrics": [refused, refused, forbidden, allowed, allowed],
    }[route.need]
    found = []
    for key in (None, "wrong-key", TEAM, ADMIN, METRICS):
        response = server.ask(route.method, path_of(route), key)
        found.append(allowed if response.status_code == 200 else error(response))
    assert found == expected


def test_the_caller_and_the_route_reach_the_app() -> None:
    server = keyed()
    seen = server.ask("GET", "/v1/adapters/poet/versions/3", OTHER).json()
    assert (seen["label"], seen["is_admin"]) == ("b", False)
    assert seen["route"] == "/v1/adapters/{name}/versions/{version}"
    seen = server.ask("POST", "/v1/completions", ADMIN).json()
    assert (seen["label"], seen["is_admin"]) == ("admin", True)
    assert server.ask("GET", "/health", TEAM).json()["label"] == "a"
    assert server.ask("POST", "/v1/adapters", ADMIN, x_request_id="r1").json()["client"] == ["testclient", "r1"]
    assert server.ask("POST", "/v1/messages", None, x_api_key=TEAM).json()["label"] == "a"


def test_a_401_says_how_to_come_back_and_repeats_no_key() -> None:
    server = keyed()
    response = server.ask("POST", "/v1/completions", "sk-very-secret")
    assert response.headers["www-authenticate"] == "Bearer"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "sk-very-secret" not in response.text + server.stream.getvalue()
    assert "found no key" in server.ask("POST", "/v1/completions").text
    assert "www-authenticate" not in server.ask("POST", "/v1/adapters", TEAM).headers


def test_without_api_keys_anybody_may_infer_whatever_key_the_client_makes_up() -> None:
    server = Server(KeyRing(admin_key=ADMIN), is_local=False, base_url="http://perft.example")
    for key in (None, "EMPTY"):
        seen = server.ask("POST", "/v1/completions", key)
        assert seen.status_code == 200 and (seen.json()["label"], seen.json()["is_admin"]) == (None, False)
        assert error(server.ask("POST", "/v1/adapters", key)) == (401, "invalid_api_key")
        assert error(server.ask("GET", "/metrics", key)) == (401, "invalid_api_key")
    assert server.ask("POST", "/v1/adapters", ADMIN).status_code == 200


# --- reach


@pytest.mark.parametrize("route", [*CHANGES, FILES], ids=lambda route: f"{route.method} {route.path}")
def test_without_an_admin_key_this_machine_may_change_adapters(route: Route) -> None:
    seen = Server().ask(route.method, path_of(route))
    assert seen.status_code == 200 and seen.json()["is_admin"]
    assert not Server().ask("GET", "/v1/adapters").json()["is_admin"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.example"},
        {"origin": "http://localhost@evil.example"},
        {"origin": "http://evil.example:8000"},
        {"origin": "http://0.0.0.0:8000"},
        {"origin": "file://"},
        {"origin": ""},
        {"origin": "http://[::1"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "localhost:8000, evil.example"},
        {"host": "evil@127.0.0.1"},
        {"host": "0.0.0.0:8000"},
        {"host": "0177.0.0.1"},
        {"host": "2130706433"},
        {"host": "192.168.0.7:8000"},
        {"host": ""},
        {"host": "localhost:x"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "Cross-Site"},
        {"x_forwarded_for": "10.0.0.7"},
        {"forwarded": "for=10.0.0.7"},
        {"via": "1.1 proxy"},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", [*CHANGES, FILES], ids=lambda route: f"{route.method} {route.path}")
def test_a_web_page_or_a_proxy_may_not(route: Route, headers: dict[str, str]) -> None:
    server = Server()
    assert error(server.ask(route.method, path_of(route), **headers)) == (403, "forbidden")
    admin = Server(KeyRing(admin_key=ADMIN))
    assert admin.ask(route.method, path_of(route), ADMIN, **headers).status_code == 200, "the key is enough"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost"},
        {"host": "LocalHost:8000"},
        {"host": "127.0.0.1"},
        {"host": "127.9.8.7:1"},
        {"host": "[::1]:8000"},
        {"host": "[::ffff:127.0.0.1]"},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "same-origin"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "HTTP://127.0.0.1:8000", "sec_fetch_site": "Same-Origin"},
        {"host": "localhost", "origin": "http://localhost"},
        {"host": "localhost", "origin": "http://localhost:80"},
        {"host": "LOCALHOST:80", "origin": "http://localhost"},
        {"host": "localhost:443", "origin": "https://localhost"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "localhost:8000", "origin": "https://localhost:8000"},
    ],
    ids=str,
)
def test_the_servers_own_pages_may(headers: dict[str, str]) -> None:
    for method, path in (("POST", "/v1/adapters"), ("POST", "/v1/completions"), ("GET", "/metrics")):
        assert Server().ask(method, path, **headers).status_code == 200


OTHER_PAGES: list[dict[str, str]] = [
    {"origin": "http://localhost:3000"},
    {"origin": "http://127.0.0.1:3000", "sec_fetch_site": "same-site"},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://127.0.0.1:80000"},
    {"origin": "http://127.0.0.1:8000/"},
    {"origin": "http://127.0.0.1:8000, http://127.0.0.1:8000"},
    {"origin": "http://x@127.0.0.1:8000"},
    {"origin": "ftp://127.0.0.1:8000"},
    {"origin": "127.0.0.1:8000"},
    {"origin": "http://localhost:8000"},
    {"origin": "http://[::1]:8000"},
    {"origin": "null"},
    {"origin": "null", "sec_fetch_site": "none"},
    {"origin": ""},
    {"origin": "file://"},
    {"origin": "chrome-extension://abc"},
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "cross-site"},
    {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-site"},
    {"sec_fetch_site": "same-site"},
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "CROSS-SITE"},
    {"sec_fetch_site": "none, same-origin"},
    {"sec_fetch_site": ""},
    {"sec_fetch_site": "anything"},
    {"host": "localhost", "origin": "https://localhost:80"},
    {"host": "localhost:80", "origin": "https://localhost"},
]


@pytest.mark.parametrize("headers", OTHER_PAGES, ids=str)
@pytest.mark.parametrize("is_local", [True, False], ids=["local", "reachable"])
def test_a_page_of_another_origin_gets_nothing_without_a_key(headers: dict[str, str], is_local: bool) -> None:
    server = Server(is_local=is_local)
    for route in (route for route in ROUTES if route.need != "none"):
        assert error(server.ask(route.method, path_of(route), **headers)) == (403, "forbidden"), route
    for path in ("/health", "/ready", "/version"):
        assert server.ask("GET", path, **headers).status_code == 200
    with_key = keyed()
    assert with_key.ask("POST", "/v1/completions", TEAM, **headers).status_code == 200, "the key is enough"


def test_the_operator_may_list_pages_that_may_use_inference_and_nothing_else() -> None:
    listed = Server()
    listed.app.state.services = replace(
        listed.app.state.services,
        origin=OriginPolicy(True, frozenset({"https://chat.example", "http://localhost:3000"})),
    )
    page = {"origin": "https://chat.example", "sec_fetch_site": "cross-site"}
    for path in ("/v1/completions", "/tokenize"):
        assert listed.ask("POST", path, **page).status_code == 200
        assert listed.ask("POST", path, origin="http://localhost:3000").status_code == 200
        for other in ("https://chat.example.evil", "http://chat.example", "https://chat.example:8443", "null"):
            assert error(listed.ask("POST", path, origin=other)) == (403, "forbidden")
        assert error(listed.ask("POST", path, host="chat.example", **page)) == (403, "forbidden"), (
            "the Host still counts"
        )
    for route in [*CHANGES, FILES]:
        assert error(listed.ask(route.method, path_of(route), **page)) == (403, "forbidden")
    assert error(listed.ask("GET", "/metrics", **page)) == (403, "forbidden")
    anybody = OriginPolicy(True, frozenset({"*"}))
    local = {"host": ["localhost"]}
    assert anybody.inference_problem(local | {"origin": ["null"], "sec-fetch-site": ["cross-site"]}) is None
    assert anybody.inference_problem(local | {"origin": ["a", "b"]}) and anybody.local_problem(
        local | {"origin": ["null"]}
    )


@pytest.mark.parametrize(
    ("scheme", "origin", "is_same"),
    [
        ("http", "http://perft.example", True),
        ("http", "https://perft.example", True),  # a proxy ends TLS
        ("https", "https://perft.example", True),
        ("https", "https://perft.example:443", True),
        ("https", "http://perft.example", False),
        ("https", "https://perft.example:80", False),
        ("http", "http://perft.example:443", False),
    ],
)
def test_whose_page_it_is_where_tls_ends(scheme: str, origin: str, is_same: bool) -> None:
    server = Server(KeyRing(admin_key=ADMIN), is_local=False, base_url=f"{scheme}://perft.example")
    answer = server.ask("POST", "/v1/completions", origin=origin, host="perft.example")
    assert (answer.status_code == 200) == is_same
    assert server.ask("POST", "/v1/adapters", ADMIN, origin=origin, host="perft.example").status_code == 200


def test_two_origins_are_none() -> None:
    own = "http://localhost:8000"
    headers = {"host": ["localhost:8000"], "origin": [own, own]}
    assert OriginPolicy(True).local_problem(headers) and OriginPolicy(False).inference_problem(headers)
    sites = {"host": ["localhost:8000"], "sec-fetch-site": ["none", "same-origin"]}
    assert OriginPolicy(True).local_problem(sites) and OriginPolicy(False).inference_problem(sites)
    assert OriginPolicy(False).inference_problem({"host": [], "origin": [own]}), "no Host, no page of it"


def test_two_hosts_are_none() -> None:
    two = {"host": ["localhost", "evil.example"]}
    assert OriginPolicy(True).local_problem(two) and OriginPolicy(True).inference_problem(two)
    both = {"host": ["localhost"], "origin": ["http://localhost", "http://evil.example"]}
    assert "Origin" in (OriginPolicy(True).local_problem(both) or "")


def test_elsewhere_nothing_changes_without_an_admin_key() -> None:
    server = Server(is_local=False)
    for route in [*CHANGES, FILES]:
        assert error(server.ask(route.method, path_of(route))) == (403, "forbidden")
    assert error(server.ask("GET", "/metrics")) == (403, "forbidden")
    assert server.ask("POST", "/v1/completions", host="anything").status_code == 200


def test_a_name_that_a_page_made_point_here_gets_no_inference_without_keys() -> None:
    for path in ("/v1/models", "/v1/adapters"):
        assert error(Server().ask("GET", path, host="rebound.evil.example")) == (403, "forbidden")
    assert error(Server().ask("POST", "/v1/completions", host="rebound.evil.example")) == (403, "forbidden")
    assert Server().ask("GET", "/health", host="anything").status_code == 200
    server = keyed(is_local=True)
    assert server.ask("POST", "/v1/completions", TEAM, host="perft.example").status_code == 200


def test_where_there_are_api_keys_a_change_needs_one_even_without_an_admin_key() -> None:
    server = Server(KeyRing([("a", TEAM)]))
    assert error(server.ask("POST", "/v1/adapters")) == (401, "invalid_api_key")
    assert error(server.ask("POST", "/v1/adapters", "wrong-key")) == (401, "invalid_api_key")
    seen = server.ask("POST", "/v1/adapters", TEAM)
    assert (seen.status_code, seen.json()["label"], seen.json()["is_admin"]) == (200, "a", True)
    assert error(server.ask("POST", "/v1/adapters", TEAM, origin="https://evil.example")) == (403, "forbidden")


def test_metrics_without_any_key_are_for_this_machine() -> None:
    assert Server().ask("GET", "/metrics").status_code == 200
    assert error(Server().ask("GET", "/metrics", host="evil.example")) == (403, "forbidden")
    with_key = Server(KeyRing(metrics_key=METRICS))
    assert error(with_key.ask("GET", "/metrics")) == (401, "invalid_api_key")
    assert with_key.ask("GET", "/metrics", METRICS).status_code == 200


def test_metrics_with_a_listener_of_their_own_are_not_here() -> None:
    server = keyed(serves_metrics=False)
    for key in (None, METRICS, ADMIN):
        assert error(server.ask("GET", "/metrics", key)) == (404, "not_found")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "::ffff:127.0.0.1"])
def test_binds_that_are_this_machines_own(host: str) -> None:
    assert is_local_bind(host) and bind_problem(host, has_admin=False) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "", None, "::", "192.168.0.7", "10.0.0.1", "no-such-host.invalid", "0"])
def test_binds_elsewhere_need_an_admin_key(host: str | None) -> None:
    problem = bind_problem(host, has_admin=False)
    assert problem is not None and "found no admin key" in problem and "--admin-key" in problem
    assert bind_problem(host, has_admin=True) is None
    assert bind_problem(host, has_admin=False, uds="/run/perft.sock") is None


def test_a_name_with_one_address_elsewhere_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [(2, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr("server.auth.origin.socket.getaddrinfo", lambda *_, **__: answers)
    assert is_local_bind("name")
    answers.append((2, 1, 6, "", ("10.0.0.7", 0)))
    assert not is_local_bind("name")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_names_of_this_machine(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name", ["localhost.", "x.localhost", "127.1", "0x7f.1", "1.2.3.4", "", "::", "[::]", "0.0.0.0"]
)
def test_names_of_others(name: str) -> None:
    assert not is_loopback(name)


# --- routes


@pytest.mark.parametrize(
    "path", ["/load", "/docs", "/v1/responses/resp_1", "/health/x", "/v1/..;/models", "/v1/adapters/a/b"]
)
def test_what_is_not_listed_is_not_there_before_anything_else(path: str) -> None:
    server = keyed()
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        response = server.ask(method, path, ADMIN)
        assert response.status_code == 404
        if method != "HEAD":
            assert error(response) == (404, "not_found")
    assert {line["path"] for line in server.lines} == {path}
    assert error(Server(is_started=False).ask("GET", path)) == (404, "not_found")


def test_the_gate_holds_though_the_app_has_the_route() -> None:
    server = Server()
    server.app.add_api_route("/pause", _answer, methods=["POST"])
    assert error(server.ask("POST", "/pause")) == (404, "not_found")


def test_another_method_is_405_and_options_says_which() -> None:
    server = keyed()
    response = server.ask("PUT", "/v1/adapters/poet")
    assert error(response) == (405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, PATCH"
    response = server.ask("OPTIONS", "/v1/completions")
    assert (response.status_code, response.content, response.headers["allow"]) == (204, b"", "OPTIONS, POST")
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters/poet", "/nowhere", "/health"])
def test_no_answer_is_taken_for_a_page(path: str) -> None:
    for server in (keyed(), Server()):
        assert server.client.get(path).headers.get_list("x-content-type-options") == ["nosniff"]


def test_head_is_get_without_the_body() -> None:
    server = keyed()
    head, get = (server.ask(method, "/v1/models", TEAM) for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] and get.json()["label"] == "a"
    assert server.ask("HEAD", "/v1/models").status_code == 401
    assert server.lines[0]["method"] == "HEAD"


@pytest.mark.parametrize("path", ["/v1/realtime", "/health", "/v1/chat/completions"])
def test_websockets_are_refused(path: str) -> None:
    with pytest.raises(WebSocketDisconnect) as closed, keyed().client.websocket_connect(path):
        pass
    assert closed.value.code == 1008


def test_until_the_engine_is_up_only_health_answers() -> None:
    server = Server(is_started=False)
    assert server.ask("GET", "/health").status_code == 200
    for path in ("/ready", "/v1/models", "/metrics", "/version"):
        response = server.ask("GET", path)
        assert error(response) == (503, "engine_unavailable") and response.headers["retry-after"] == "5"


# --- request ids


@pytest.mark.parametrize("given", ["abc", "A-1_b.c", "x" * 64])
def test_a_sane_request_id_is_kept(given: str) -> None:
    response = Server().ask("GET", "/v1/models", x_request_id=given)
    assert response.headers.get_list("x-request-id") == [given]
    assert response.json()["request_id"] == given and response.json()["header"] == [given]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a/b", "é", "a,b", "<script>"])
def test_any_other_is_replaced(given: str) -> None:
    response = Server().client.get("/v1/models", headers=[(b"x-request-id", given.encode("latin-1"))])
    (found,) = response.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", found) and response.json()["header"] == [found]


def test_every_answer_has_one_of_its_own() -> None:
    server = keyed()
    answers = [
        server.ask("GET", "/health"),
        server.ask("GET", "/nowhere"),
        server.ask("PUT", "/health"),
        server.ask("POST", "/v1/completions"),
        server.ask("GET", "/v1/models?boom", TEAM),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 405, 401, 500]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5
    assert error(answers[-1]) == (500, "internal_error") and "boom" not in answers[-1].text
    logged = [(line["request_id"], line["status"]) for line in server.lines]
    assert logged == [(answer.headers["x-request-id"], answer.status_code) for answer in answers]


def test_an_unexpected_error_is_answered_as_any_other_whatever_the_app_would_say() -> None:
    server = Server()

    async def handler(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"said": str(error)}, 503)

    server.app.add_exception_handler(Exception, handler)
    response = server.ask("GET", "/v1/models?boom", x_request_id="r1")
    assert error(response) == (500, "internal_error") and response.headers["x-request-id"] == "r1"
    assert "r1" in response.text and "boom" not in response.text


# --- the access log


def test_a_line_says_what_the_server_found_out() -> None:
    server = keyed()
    server.ask("POST", "/v1/completions?facts", TEAM, x_request_id="r1")
    (line,) = server.lines
    assert line["seconds"] >= 0
    expected = {"request_id": "r1", "label": "a", "method": "POST", "path": "/v1/completions", "status": 200}
    facts = {"adapter": "poet", "version": 3, "prompt_tokens": None, "generation_tokens": 7}
    assert line | expected | facts == line


def test_the_log_has_no_key_and_no_query() -> None:
    server = keyed()
    server.ask("GET", f"/v1/adapters/{TEAM}?key={ADMIN}", TEAM)
    for key in (TEAM, ADMIN, METRICS):
        server.ask("GET", f"/no/{key}/route?key={key}", METRICS)
    text = server.stream.getvalue()
    assert len(server.lines) == 4 and not any(key in text for key in (TEAM, ADMIN, METRICS))
    assert {line["path"] for line in server.lines} == {"/v1/adapters/{name}", "/no/***/route"}


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/chat/completion", "/v1/chat/completion"),
        ("//v1//modelz/", "//v1//modelz/"),
        ("/a%0astatus=200", "/a%0Astatus=200"),
        ("/a%20b%1b[31m%e2%80%a8", "/a%20b%1B%5B31m%E2%80%A8"),
        ("/" + "a" * 1000, "/" + "a" * 196 + "..."),
        ("/" + "%0a" * 1000, "/" + "%0A" * 65 + "%..."),
        ("/a" * 1000, "/a" * 19 + "/..."),
    ],
)
def test_the_log_shows_a_path_that_is_no_route_in_one_bounded_line(path: str, shown: str) -> None:
    server = keyed()
    assert server.ask("GET", f"https://perft.example{path}", TEAM).status_code == 404
    (line,) = server.lines
    assert line["path"] == shown and len(shown) <= 200


# --- slashes


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_slashes_count_once_on_every_route(route: Route) -> None:
    server = keyed()
    plain = path_of(route)
    for path in (f"/{plain}", f"{plain}/", f"{plain}//", plain.replace("/", "//"), f"///{plain[1:]}///"):
        for method in (route.method, *(["HEAD"] if route.method == "GET" else [])):
            response = server.ask(method, f"https://perft.example{path}", ADMIN)
            assert response.status_code == 200, (method, path)
            if method != "HEAD":
                assert response.json()["route"] == route.path, path
            refused = server.ask(method, f"https://perft.example{path}").status_code
            assert refused == (200 if route.need == "none" else 401), path


def test_the_app_sees_the_one_path_that_access_was_checked_for() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    owner = keyed()

    async def ask(path: str, root_path: str) -> None:
        scope = asgi_scope(path, TEAM, "GET") | {"app": owner.app, "root_path": root_path}
        scope["raw_path"] = path.encode()
        await AccessControl(app)(scope, _nothing, _drop)
        assert scope["path"] == path, "the server's own scope stays"

    paths = {
        ("//v1//models/", ""): "/v1/models",
        ("/v1/adapters//poet/", ""): "/v1/adapters/poet",
        ("/prefix//v1/models", "/prefix"): "/prefix/v1/models",
        ("/v1/models///", ""): "/v1/models",
        ("//v1/models//org//name/", ""): "/v1/models//org//name/",  # a model's name keeps its own
        ("/v1/adapters/p%6Fet//", ""): "/v1/adapters/p%6Fet",
    }
    for path, root_path in paths:
        asyncio.run(ask(path, root_path))
    assert [scope["path"] for scope in seen] == list(paths.values())
    assert [unquote(scope["raw_path"].decode()) for scope in seen] == [scope["path"] for scope in seen]
    assert {scope["root_path"] for scope in seen} == {"", "/prefix"}


@pytest.mark.parametrize(
    "path", ["/" * 16_000, "/v1" * 10 + "/" * 16_000, "/v1/models" * 1_600, "/v1//" * 3_200, "/v1//models/" * 1_300]
)
def test_a_path_of_slashes_takes_no_time(path: str) -> None:
    """Without any key: one of 16 KB took 73 ms of the event loop."""
    began = time.thread_time()
    found = [one_path({"path": path}) for _ in range(10)]
    assert time.thread_time() - began < 0.2 and found


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _drop(message: Message) -> None:
    pass


# --- proxies


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "client"),
    [
        ((), "10.0.0.7", ["1.2.3.4"], "10.0.0.7"),
        (("10.0.0.0/8",), "10.0.0.7", ["1.2.3.4"], "1.2.3.4"),
        (("10.0.0.0/8",), "10.0.0.7", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        (("10.0.0.0/8",), "10.0.0.7", ["6.6.6.6, 1.2.3.4, 10.0.0.9"], "1.2.3.4"),
        (("10.0.0.0/8",), "10.0.0.7", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        (("10.0.0.7",), "10.0.0.7", ["6.6.6.6, 10.0.0.9"], "10.0.0.9"),
        (("10.0.0.0/8",), "10.0.0.7", ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.7", ["1.2.3.4:5678"], "1.2.3.4"),
        (("10.0.0.0/8", "::1"), "::1", ["[2001:db8::1]:80"], "2001:db8::1"),
        (("10.0.0.0/8",), "::ffff:10.0.0.7", ["1.2.3.4"], "1.2.3.4"),
        (("10.0.0.0/8",), "10.0.0.7", ["6.6.6.6, unknown"], "10.0.0.7"),
        (("10.0.0.0/8",), "10.0.0.7", ["6.6.6.6\\n, a b"], "10.0.0.7"),
        (("10.0.0.0/8",), "10.0.0.7", [""], "10.0.0.7"),
        (("10.0.0.0/8",), "10.0.0.7", [], "10.0.0.7"),
        (("10.0.0.0/8",), "9.9.9.9", ["1.2.3.4"], "9.9.9.9"),
        (("unix",), None, ["1.2.3.4"], "1.2.3.4"),
        (("10.0.0.0/8",), None, ["1.2.3.4"], None),
    ],
)
def test_the_client_is_the_last_one_that_no_trusted_proxy_is(
    proxies: tuple[str, ...], peer: str | None, forwarded: list[str], client: str | None
) -> None:
    assert TrustedProxies(proxies).client_of(peer, forwarded) == client
    server = keyed(proxies=proxies)
    found: list[Any] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        found.append((scope["state"]["caller"].client, scope["client"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    scope = asgi_scope("/v1/adapters", ADMIN) | {"app": server.app, "client": peer and (peer, 1)}
    scope["headers"] += [(b"x-forwarded-for", value.encode()) for value in forwarded]
    asyncio.run(AccessControl(app)(scope, _nothing, _drop))
    ((of_caller, of_scope),) = found
    assert of_caller == client and (of_scope[0] if of_scope else None) == client


@pytest.mark.parametrize("entry", ["proxy.example", "10.0.0.0/33", "10.0.0.1/8", "*", "unix:/x"])
def test_a_proxy_is_an_address_or_a_network(entry: str) -> None:
    with pytest.raises(ValueError, match="expected an IP address"):
        Settings(trusted_proxies=f"10.0.0.1, {entry}")


FORWARDED = [
    *("forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port"),
    *("x-forwarded-server", "x-forwarded-prefix", "x-forwarded", "x-real-ip", "x-client-ip", "true-client-ip"),
    *("cf-connecting-ip", "cf-ray", "fastly-client-ip", "x-cluster-client-ip", "x-original-forwarded-for"),
    *("x-envoy-external-address", "x-remote-addr", "forwarded-for", "x-amzn-trace-id", "x-original-host"),
]


@pytest.mark.parametrize("name", FORWARDED)
def test_without_keys_this_machine_is_not_whoever_a_proxy_asks_for(name: str) -> None:
    server = Server()
    for route in ROUTES:
        response = server.ask(route.method, path_of(route), **{name: "1"})
        assert response.status_code == (200 if route.need == "none" else 403), route
    named = Server(proxies=("10.0.0.0/8", "127.0.0.0/8"))
    for route in ROUTES:  # the operator named it: inference as before, but changes need a key all the more
        client = TestClient(named.app, LOCAL, client=("127.0.0.1", 1))
        response = client.request(route.method, path_of(route), headers={name: "1"})
        assert response.status_code == (403 if route.need in ("admin", "metrics") else 200), route


# --- limits, on the ASGI level


@pytest.fixture
def streaming() -> Iterator[tuple[Server, asyncio.Event]]:
    """A server whose completions stream one chunk, wait for the event, then stream the last."""
    server, go_on = keyed(limits=RateLimits(max_requests=1)), asyncio.Event()

    async def stream(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await go_on.wait()
            yield b"last"

        return StreamingResponse(chunks())

    server.app.router.routes[:] = [r for r in server.app.routes if getattr(r, "path", "") != "/v1/completions"]
    server.app.add_api_route("/v1/completions", stream, methods=["POST"], response_model=None)
    yield server, go_on


def asgi_scope(path: str, key: str, method: str = "POST") -> Scope:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("perft.example", 80),
        "client": ("10.0.0.7", 1),
        "headers": [(b"host", b"perft.example"), (b"authorization", f"Bearer {key}".encode())],
    }


class Client:
    """One request on the ASGI level, which can leave while it is answered."""

    def __init__(self, app: FastAPI, path: str, key: str, method: str = "POST") -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self._received = False
        self.task = asyncio.create_task(app(asgi_scope(path, key, method), self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def started(self) -> int:
        while len(self.sent) < 2:
            await asyncio.sleep(0)
        status: int = self.sent[0]["status"]
        return status


def test_a_request_counts_until_its_response_has_ended(streaming: tuple[Server, asyncio.Event]) -> None:
    server, go_on = streaming

    async def run() -> None:
        first = Client(server.app, "/v1/completions", TEAM)
        assert await first.started() == 200
        second = Client(server.app, "/v1/completions", TEAM)
        assert await second.started() == 429
        assert (b"retry-after", b"1") in second.sent[0]["headers"]
        assert json.loads(second.sent[1]["body"])["error"]["code"] == "rate_limited"
        assert await Client(server.app, "/v1/models", TEAM, "GET").started() == 200, "reading takes no place"
        assert await Client(server.app, "/tokenize", OTHER).started() == 200, "another key has its own"
        assert await Client(server.app, "/tokenize", ADMIN).started() == 200
        go_on.set()
        await first.task
        third = Client(server.app, "/v1/completions", TEAM)
        assert await third.started() == 200
        await third.task
        assert server.limits.running("a") == 0

    asyncio.run(run())


def test_a_place_is_free_before_the_last_byte_is_sent(streaming: tuple[Server, asyncio.Event]) -> None:
    server, go_on = streaming
    go_on.set()
    running: list[int] = []

    async def run() -> None:
        client = Client(server.app, "/v1/completions", TEAM)
        keep = client._send

        async def send(message: Message) -> None:
            running.append(server.limits.running("a"))
            await keep(message)

        client.task.cancel()
        await server.app(asgi_scope("/v1/completions", TEAM), client._receive, send)

    asyncio.run(run())
    assert running == [1, 1, 1, 0]


def test_a_client_that_leaves_gives_its_place_back(streaming: tuple[Server, asyncio.Event]) -> None:
    server, _ = streaming

    async def run() -> None:
        client = Client(server.app, "/v1/completions", TEAM)
        await client.started()
        assert server.limits.running("a") == 1
        client.left.set()
        await client.task
        assert server.limits.running("a") == 0
        cancelled = Client(server.app, "/v1/completions", TEAM)
        await cancelled.started()
        cancelled.task.cancel()
        await asyncio.gather(cancelled.task, return_exceptions=True)

    asyncio.run(run())
    assert server.limits.running("a") == 0 and [line["status"] for line in server.lines] == [200, 200]


def test_a_request_that_fails_gives_its_place_back() -> None:
    server = keyed(limits=RateLimits(max_requests=1))
    for _ in range(3):
        assert server.ask("POST", "/v1/completions?boom", TEAM).status_code == 500
    assert server.limits.running("a") == 0


def test_tokens_used_up_are_429_for_that_key_alone() -> None:
    limits = RateLimits(tokens_per_minute=60, clock=lambda: 0.0)
    server = keyed(limits=limits)
    limits.charge("a", 600)
    response = server.ask("POST", "/v1/chat/completions", TEAM)
    assert error(response) == (429, "rate_limited") and 500 < int(response.headers["retry-after"]) <= 541
    assert server.ask("POST", "/v1/chat/completions", OTHER).status_code == 200
    limits.charge("admin", 600)
    assert server.ask("POST", "/v1/chat/completions", ADMIN).status_code == 200


@pytest.mark.parametrize(("length", "closes"), [(100, False), (10**9, True)])
def test_a_refused_upload_is_not_read_to_its_end(length: int, closes: bool) -> None:
    refused = keyed().ask("POST", "/v1/adapters", content_length=str(length))
    assert refused.status_code == 401
    assert (refused.headers.get("connection") == "close") is closes


def test_a_rejected_request_is_logged_with_its_key() -> None:
    server = keyed()
    server.ask("DELETE", "/v1/adapters/poet", TEAM)
    server.ask("GET", "/no/such/route", TEAM)
    server.ask("PUT", "/v1/models", OTHER)
    server.ask("GET", "/v1/models", "a-key-nobody-has")
    found = [(line["status"], line.get("label")) for line in server.lines]
    assert found == [(403, "a"), (404, "a"), (405, "b"), (401, None)]
