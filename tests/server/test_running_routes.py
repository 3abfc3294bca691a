"""Every route of the running server, with what it needs; asked with no key, a tenant's key and the admin's."""

import ast
import json
import socket
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from itertools import product
from pathlib import Path

import pytest
import vllm

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.tiny_server import KEYS, TinyClient

ADAPTER = "/v1/adapters/{name}"
VERSION = ADAPTER + "/versions/{version}"
LISTED: dict[tuple[str, str], str] = {
    ("GET", "/health"): "nothing",
    ("GET", "/ready"): "nothing",
    ("GET", "/version"): "nothing",
    ("GET", "/metrics"): "admin",
    ("GET", "/openapi.json"): "key",
    ("GET", "/v1/models"): "key",
    ("GET", "/v1/models/{model}"): "key",
    ("POST", "/v1/chat/completions"): "key",
    ("POST", "/v1/completions"): "key",
    ("POST", "/v1/responses"): "key",
    ("POST", "/v1/messages"): "key",
    ("POST", "/v1/messages/count_tokens"): "key",
    ("POST", "/tokenize"): "key",
    ("POST", "/detokenize"): "key",
    ("GET", "/v1/adapters"): "key",
    ("POST", "/v1/adapters"): "admin",
    ("GET", ADAPTER): "key",
    ("PATCH", ADAPTER): "admin",
    ("DELETE", ADAPTER): "admin",
    ("GET", VERSION): "key",
    ("DELETE", VERSION): "admin",
    ("GET", VERSION + "/files/{file}"): "admin",
}
CONSOLE: dict[tuple[str, str], str] = {
    ("GET", "/"): "nothing",
    ("GET", "/console/session"): "nothing",
    ("GET", "/console/metrics"): "admin",
}
"""Not in the OpenAPI document."""
LISTED |= CONSOLE
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get", "GETS")
# Of vLLM's dependencies, not in its own source: SageMaker's aliases, FastAPI's pages.
OTHER_PATHS = {
    "/ping", "/invocations", "/adapters", "/adapters/poet", "/docs", "/redoc", "/docs/oauth2-redirect",
    "/v1", "/v1/", "/static/x", "/console", "/index.html",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load",
}  # fmt: skip
DECORATORS = {"get", "put", "post", "delete", "patch", "head", "api_route", "websocket", "mount", "add_api_route"}
REFUSALS = {"invalid_api_key", "forbidden", "not_found", "method_not_allowed"}
NO_HTTP = "found no valid HTTP request"

Headers = list[tuple[str, str]]
Reply = tuple[int, str | None]
"""Status and error code; (0, None): the connection was closed without an answer."""


def bearer(label: str) -> Headers:
    return [("Authorization", f"Bearer {KEYS.get(label, label)}")]


def ask(server: ServerProcess, method: str, target: str, headers: Headers | None = None, body: bytes = b"{}") -> Reply:
    """Send exactly this, as no well-behaved client would."""
    lines = [("Host", f"127.0.0.1:{server.port}"), ("Content-Type", "application/json"), *(headers or [])]
    text = "".join(f"{name}: {value}\r\n" for name, value in lines)
    head = f"{method} {target} HTTP/1.1\r\n{text}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as connection:
        connection.sendall(head.encode("latin-1") + body)
        response = HTTPResponse(connection, method=method)
        try:
            response.begin()
            content = response.read()
        except (HTTPException, ConnectionError):
            return 0, None
    try:
        error = json.loads(content)["error"]
        return response.status, NO_HTTP if error["message"] == NO_HTTP else str(error["code"])
    except (ValueError, KeyError, TypeError):
        return response.status, None


def is_open(reply: Reply) -> bool:
    """Whether a request got past access control."""
    status, code = reply
    return status != 0 and code not in REFUSALS | {NO_HTTP}


def path_of(template: str) -> str:
    """A path of a route that changes nothing: of an adapter that is not there."""
    return template.replace("{name}", "nobody").replace("{version}", "1").replace("{file}", "config").replace(
        "{model}", "nobody"
    )  # fmt: skip


def paths_of_vllm() -> set[str]:
    """Every path that vLLM's source hangs into an app, whatever flag or task it waits for."""
    found: set[str] = set()
    for file in (Path(vllm.__file__).parent / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DECORATORS:
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith("/"):
                    found.add(first.value)
    return found


def test_the_running_app_has_what_is_listed_and_no_more(admin: TinyClient) -> None:
    paths = admin.http.get("/openapi.json").json()["paths"]
    running = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert running | {("GET", "/openapi.json"), *CONSOLE} == set(LISTED)


@pytest.mark.parametrize(("method", "template"), LISTED)
def test_what_a_route_needs(server: ServerProcess, method: str, template: str) -> None:
    path, need = path_of(template), LISTED[method, template]
    no_key, wrong = ask(server, method, path), ask(server, method, path, bearer("wrong-key-0123456789"))
    tenant, owner = ask(server, method, path, bearer("alice")), ask(server, method, path, bearer("admin"))
    assert is_open(owner), owner
    assert is_open(tenant) if need != "admin" else tenant == (403, "forbidden")
    for stranger in (no_key, wrong):
        assert is_open(stranger) if need == "nothing" else stranger == (401, "invalid_api_key")


@pytest.mark.parametrize("template", sorted({template for _, template in LISTED}))
def test_no_other_method_is_there(server: ServerProcess, template: str) -> None:
    own = {method for method, listed in LISTED if listed == template}
    for method in METHODS:
        reply = ask(server, method, path_of(template), bearer("admin"))
        if method == "OPTIONS":
            assert reply == (204, None)
        elif method not in own and not (method == "HEAD" and "GET" in own):
            assert reply[0] in (400, 405) and not (is_open(reply) and method != "HEAD"), (method, reply)


@pytest.mark.parametrize(("method", "template"), [key for key in LISTED if key[0] == "GET"])
def test_a_head_needs_what_its_get_needs(server: ServerProcess, method: str, template: str) -> None:
    path, need = path_of(template), LISTED[method, template]
    status = {label: ask(server, "HEAD", path, bearer(label))[0] for label in ("nobody", "alice", "admin")}
    assert status["nobody"] == (ask(server, "GET", path)[0] if need == "nothing" else 401)
    assert status["alice"] == (403 if need == "admin" else ask(server, "GET", path, bearer("alice"))[0])
    assert status["admin"] == ask(server, "GET", path, bearer("admin"))[0]


def test_vllms_other_routes_are_gone(server: ServerProcess) -> None:
    listed = {template for _, template in LISTED} | {"/v1/responses/{response_id}"}
    known = paths_of_vllm()
    assert len(known) > 40 and {"/v1/embeddings", "/pause", "/load", "/v1/realtime", "/collective_rpc"} <= known
    unlisted = {path.replace("{response_id}", "resp_1") for path in known - listed} | OTHER_PATHS
    for path in sorted(unlisted | {"/v1/responses/resp_1"}):
        for method, headers in product(("GET", "POST", "DELETE", "PUT", "OPTIONS"), ([], bearer("admin"))):
            assert ask(server, method, path, headers) == (404, "not_found"), (method, path)


# Tricks

GUARDED = [("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/nobody"), ("GET", "/metrics"), ("GET", "/v1/models"),
           ("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/console/metrics")]  # fmt: skip


def spellings(path: str) -> Iterator[str]:
    """Other ways to write a path, each of which somebody's proxy or router takes for it."""
    inner = path[1:]
    yield from (path + "/", path + "//", "/" + path, "//" + path, path.upper(), path.title(), path.replace("/", "//"))
    yield from ("/%2F" + inner, "%2F" + inner, path.replace("/", "%2F"), "/" + inner.replace("/", "%2f"))
    yield from (path + "%2F", path + "%00", path + "%20", path + "%0a", path + ".json", path + ";a=b", path + "/..;/")
    yield from ("/." + path, "/health/.." + path, "/health/..;" + path, "/health/%2e%2e" + path, "/health;" + path)
    yield from ("/health" + path, "/health%3f" + path, "/health%23" + path, path + "?/health", path + "#/health")
    yield from ("/" + inner.replace("/", "\\"), "/" + inner.replace("/", "%5c"), path.replace("a", "%61"))
    yield from (path.replace("a", "%2561"), path.replace("a", "\xe0"), f"http://127.0.0.1{path}", f"http://other{path}")
    yield from (inner, "*", f"/v1/../{inner}", f"/%76%31/..{path}", path.replace("e", "%c0%a5"), path + "%e2%80%8b")


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_no_spelling_opens_a_route(server: ServerProcess, method: str, path: str) -> None:
    strangers = [[], bearer("wrong-key-0123456789")]
    if LISTED.get((method, path.replace("nobody", "{name}"))) == "admin":
        strangers.append(bearer("alice"))
    for spelling, headers in product(spellings(path), strangers):
        reply = ask(server, method, spelling, headers)
        assert not is_open(reply), (spelling, headers, reply)


FORGED: list[Headers] = [
    [("X-Forwarded-For", "127.0.0.1"), ("X-Real-IP", "127.0.0.1"), ("Forwarded", "for=127.0.0.1;proto=https")],
    [("X-Original-URL", "/health"), ("X-Rewrite-URL", "/health"), ("X-Forwarded-Path", "/health")],
    [("X-Forwarded-Prefix", "/health"), ("X-Script-Name", "/health"), ("X-Forwarded-Host", "localhost")],
    [("X-HTTP-Method-Override", "GET"), ("X-HTTP-Method", "GET"), ("X-Method-Override", "OPTIONS")],
    [("Access-Control-Request-Method", "POST"), ("Sec-Fetch-Site", "same-origin")],
    [("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA")],
    [("Cookie", f"Authorization=Bearer {KEYS['admin']}; key={KEYS['admin']}")],
    [("Proxy-Authorization", f"Bearer {KEYS['admin']}")],
    [("X-Request-Id", "1"), ("Content-Type", "multipart/form-data")],
]
NO_KEYS: list[Headers] = [
    [("Authorization", value)]
    for value in (
        "", "Bearer", "Bearer ", "Bearer null", "Bearer undefined", "Bearer None", "Bearer *", "Bearer true",
        f"Basic {KEYS['admin']}", f"Token {KEYS['admin']}", KEYS["admin"], f"Bearer{KEYS['admin']}",
        f"Bearer {KEYS['admin']}x", f"Bearer {KEYS['admin'][:-1]}", f"Bearer {KEYS['admin'].upper()}",
        f"Bearer wrong, Bearer {KEYS['admin']}", f"Bearer admin={KEYS['admin']}", "Bearer admin", "Bearer \xff\xfe",
        f"Bearer {'x' * 8000}",
    )
] + [[("X-API-Key", "")], [("X-API-Key", "admin")]]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_no_header_opens_a_route(server: ServerProcess, method: str, path: str) -> None:
    for headers in FORGED + NO_KEYS:
        reply = ask(server, method, path, headers)
        assert reply in ((401, "invalid_api_key"), (400, NO_HTTP)), (headers, reply)
    if LISTED.get((method, path.replace("nobody", "{name}"))) == "admin":
        for headers in FORGED:
            assert ask(server, method, path, [*bearer("alice"), *headers]) == (403, "forbidden"), headers


def test_of_several_keys_the_first_authorization_counts(server: ServerProcess) -> None:
    wrong = bearer("wrong-key-0123456789")
    other = [("X-API-Key", KEYS["admin"])]
    for given in ([*bearer("alice"), *bearer("admin")], [*bearer("alice"), *other], [*other, *bearer("alice")]):
        assert ask(server, "DELETE", "/v1/adapters/nobody", given) == (403, "forbidden")
    for given in ([*wrong, *bearer("admin")], [*wrong, *other], [*other, *wrong]):
        assert ask(server, "DELETE", "/v1/adapters/nobody", given) == (401, "invalid_api_key")
    assert ask(server, "DELETE", "/v1/adapters/nobody", other) == (404, "adapter_not_found")


def test_a_method_in_a_header_is_not_the_method(server: ServerProcess, admin: TinyClient, tmp_path: Path) -> None:
    assert admin.upload("kept", tiny_server.adapter(tmp_path / "kept", seed=21)).status_code == 201
    try:
        override = [("X-HTTP-Method-Override", "DELETE"), ("X-HTTP-Method", "DELETE"), ("X-Method-Override", "DELETE")]
        for target, read in (
            ("/v1/adapters/kept", (200, None)),
            ("/v1/adapters/kept?_method=DELETE", (400, "invalid_request")),
        ):
            assert ask(server, "GET", target, [*bearer("alice"), *override]) == read
            assert ask(server, "POST", target, [*bearer("admin"), *override], b"_method=DELETE")[0] == 405
        assert admin.adapter("kept")["versions"][0]["state"] == "ready"
    finally:
        admin.remove("kept")


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/responses", "/v1/completions", "/health", "/", "/metrics"])
@pytest.mark.parametrize("label", ["", "alice", "admin"])
def test_no_websocket_is_opened(server: ServerProcess, path: str, label: str) -> None:
    """The offer of another protocol is ignored: the answer is that of a plain GET."""
    upgrade = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "x" * 22 + "==")]
    headers = "".join(f"{name}: {value}\r\n" for name, value in [*upgrade, *(bearer(label) if label else [])])
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n{headers}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as connection:
        connection.sendall(head.encode())
        response = HTTPResponse(connection)
        response.begin()
        assert response.status == ask(server, "GET", path, bearer(label) if label else [])[0]
        assert response.status in (200, 401, 403, 404, 405)


def test_a_request_behind_another_is_asked_for_its_own_key(server: ServerProcess) -> None:
    """One connection, two requests: what the first was allowed is not the second's."""
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    first = f"GET /v1/models HTTP/1.1\r\n{host}Authorization: Bearer {KEYS['admin']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as connection:
        connection.sendall((first + f"GET /metrics HTTP/1.1\r\n{host}Connection: close\r\n\r\n").encode())
        stream, statuses = connection.makefile("rb"), []
        for line in stream:
            if line.startswith(b"HTTP/1.1 ") or b"HTTP/1.1 " in line:
                statuses.append(int(line.rpartition(b"HTTP/1.1 ")[2].split()[0]))
    assert statuses == [200, 401]
