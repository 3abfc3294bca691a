"""Real sockets against our server with a fake engine: nobody holds a connection, memory or time without a limit."""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.app.connections import KEEP_ALIVE_VARIABLE, limits_of, loop_factory
from server.connections.protocol import LINGER_BYTES, MAX_PIPELINED, MAX_URL_BYTES
from server.settings.model import Settings
from tests.server.fake_server import bearer
from tests.server.local_server import LocalServer, local_server
from tests.server.processes import LIMIT_S, ServerProcess, free_port, launch, wait_until
from tests.server.raw_connection import RawConnection, code_of, request, status_of

HEALTH = request("GET", "/health")
KEY = bearer("alice")["Authorization"]
LONG_S = 3600.0
HEADER_BYTES = 8192

Start = Callable[..., LocalServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(local_server(tmp_path, **settings))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with patience, and small limits of size."""
    folder = tmp_path_factory.mktemp("connections")
    with local_server(folder, max_header_bytes=HEADER_BYTES, max_headers=32) as running:
        yield running


@contextmanager
def in_a_process(folder: Path) -> Iterator[ServerProcess]:
    port = free_port()
    arguments = ["-m", "tests.server.fake_server", "--store", str(folder / "store"), "--port", str(port)]
    running = launch(arguments, port, folder / "log")
    running.wait_until("/ready")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server in a process of its own."""
    with in_a_process(tmp_path_factory.mktemp("process")) as running:
        yield running


def ask(server: LocalServer, data: bytes) -> bytes:
    """What comes back, to the end of the connection."""
    with RawConnection(server.port) as connection:
        connection.send(data)
        return connection.read_to_end()


def assert_alive(server: LocalServer) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200


# --- heads


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"X: " + b"a" * HEADER_BYTES, 431, "headers_too_large"),
        (b"a" * 2 * HEADER_BYTES + b": b", 431, "headers_too_large"),
        (b"\r\n".join(b"X: " + b"a" * 400 for _ in range(31)), 431, "headers_too_large"),
        (b"\r\n".join(b"X%d: a" % number for number in range(40)), 431, "headers_too_large"),
        (b"X: a\x00b", 400, "invalid_request"),
        (b"no colon at all", 400, "invalid_request"),
        (b"Content-Length: 1\r\nContent-Length: 2", 400, "invalid_request"),
        (b"Content-Length: x", 400, "invalid_request"),
    ],
    ids=["value", "name", "sum", "count", "nul", "colon", "lengths", "length"],
)
def test_a_head_that_is_too_large_or_none_is_refused(server: LocalServer, head: bytes, status: int, code: str) -> None:
    for end in (b"\r\n\r\n", b""):  # whole, and never ending
        if status == 400 and not end:
            continue
        response = ask(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + end)
        assert (status_of(response), code_of(response)) == (status, code), end
        assert b"connection: close" in response.lower() and b"x-request-id: " in response.lower()
        assert b"x-content-type-options: nosniff" in response.lower()
    assert_alive(server)


@pytest.mark.parametrize("end", [b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b""], ids=["whole", "endless"])
def test_a_url_is_bounded(server: LocalServer, end: bytes) -> None:
    response = ask(server, b"GET /" + b"a" * (MAX_URL_BYTES + 1) + end)
    assert (status_of(response), code_of(response)) in ((414, "url_too_long"), (431, "headers_too_large"))


def test_heads_within_the_limits_are_taken(server: LocalServer) -> None:
    near = {f"X-{number}": "a" * 250 for number in range(25)}
    assert status_of(ask(server, request("GET", "/health", **near, Connection="close"))) == 200
    with RawConnection(server.port) as connection:
        for byte in request("GET", "/health", Connection="close"):
            connection.send(bytes([byte]))
        assert status_of(connection.read_to_end()) == 200


def test_an_endless_head_costs_next_to_nothing(process: ServerProcess) -> None:
    """130 MB took 31 s of CPU: each piece was joined to all before it."""
    server = psutil.Process(process.process.pid)
    before, memory = server.cpu_times(), server.memory_info().rss
    with RawConnection(process.port) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nX: ")
        sent = 0
        while sent < 130 * 1024**2 and connection.send(b"a" * 1024**2):
            sent += 1024**2
    spent = server.cpu_times()
    assert sent < 130 * 1024**2, "the server read all of it"
    assert (spent.user + spent.system) - (before.user + before.system) < 3
    assert server.memory_info().rss - memory < 64 * 1024**2
    assert httpx.get(f"{process.url}/health").status_code == 200


def test_the_client_can_read_why_though_it_had_sent_more(server: LocalServer) -> None:
    with RawConnection(server.port) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nX: " + b"a" * (LINGER_BYTES // 2))
        assert status_of(connection.read_to_end()) == 431


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [("/v1/completions", KEY, 413), ("/v1/completions", "Bearer x", 401), ("/none", KEY, 404)],
)
def test_the_client_can_read_why_though_its_body_was_not(server: LocalServer, path: str, key: str, status: int) -> None:
    """Answered by its headers alone. A connection closed with its body unread is reset, and asyncio's clients lose the
    response with it."""

    async def ask() -> list[int]:
        headers = {"Authorization": key, "Content-Type": "application/json"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=LIMIT_S) as client:
            return [(await client.post(path, content=b"[" * (LINGER_BYTES // 2))).status_code for _ in range(10)]

    assert asyncio.run(ask()) == [status] * 10


def test_trailers_are_bounded_and_no_headers(server: LocalServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    head += f"Authorization: {KEY}\r\n\r\n".encode()
    body = json.dumps({"model": "base"}).encode()
    chunk = b"%x\r\n%b\r\n" % (len(body), body)
    many = b"".join(b"X%d: a\r\n" % number for number in range(100))
    for trailers in (many, b"X: " + b"a" * 4 * HEADER_BYTES):
        response = ask(server, head + chunk + b"0\r\n" + trailers)
        assert status_of(response) in (400, 431), trailers[:10]
    response = ask(server, head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunk + b"0\r\nX: a\r\n\r\n")
    assert status_of(response) == 200
    assert_alive(server)


@pytest.mark.parametrize(
    "framing",
    [b"1;" + b"x" * 100_000 + b"\r\na\r\n", b"1\r\na\r\n" * 100_000, b"0" * 10_000 + b"1\r\na\r\n"],
    ids=["extensions", "tiny chunks", "zeros"],
)
def test_framing_is_bounded(server: LocalServer, framing: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    head += f"Authorization: {KEY}\r\nConnection: close\r\n\r\n".encode()
    response = ask(server, head + framing + b"0\r\n\r\n")
    assert (status_of(response), code_of(response)) == (400, "invalid_request")
    assert_alive(server)


# --- requests after each other


def test_a_few_pipelined_requests_are_answered_in_turn(server: LocalServer) -> None:
    with RawConnection(server.port) as connection:
        connection.send(HEALTH * 5 + request("GET", "/health", Connection="close"))
        assert connection.read_to_end().count(b"HTTP/1.1 200 OK") == 6


def test_a_flood_of_pipelined_requests_ends_the_connection(server: LocalServer) -> None:
    with RawConnection(server.port) as connection:
        connection.send(HEALTH * 20 * MAX_PIPELINED)
        assert connection.read_to_end().count(b"HTTP/1.1 200 OK") <= MAX_PIPELINED + 1
    assert_alive(server)


def test_what_follows_a_stream_does_not_get_into_it(server: LocalServer) -> None:
    """uvicorn writes its 400 into the middle of the response that is being sent."""
    body = json.dumps({"model": "base", "stream": True, "max_tokens": 20, "seconds_per_token": 0.05}).encode()
    with RawConnection(server.port) as connection:
        connection.send(request("POST", "/v1/completions", body, Authorization=KEY))
        response = connection.read_until(b"data: ")
        connection.send(b"this is no request\r\n\r\n")
        response += connection.read_to_end()
    assert response.count(b"HTTP/1.1") == 1 and b"invalid_request" not in response


@pytest.mark.parametrize("size", [300, 300_000])
@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/completions"])
def test_nothing_of_a_compressed_body_is_read_as_a_request(server: LocalServer, path: str, size: int) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"}
    with RawConnection(server.port) as connection:
        connection.send(request("POST", path, HEALTH + b"a" * size, Authorization=bearer()["Authorization"], **headers))
        response = connection.read_to_end()
    assert (status_of(response), code_of(response)) == (415, "unsupported_encoding")
    assert response.count(b"HTTP/1.1") == 1 and b"\r\nconnection: close\r\n" in response.lower()


@pytest.mark.parametrize("is_sent_at_once", [True, False])
def test_a_bad_body_behind_a_stream_does_not_get_into_it(server: LocalServer, is_sent_at_once: bool) -> None:
    """Its head was whole, so it waits for its turn as the connection's latest request."""
    body = json.dumps({"model": "base", "stream": True, "max_tokens": 20, "seconds_per_token": 0.05}).encode()
    bad = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with RawConnection(server.port) as connection:
        connection.send(request("POST", "/v1/completions", body, Authorization=KEY) + (bad if is_sent_at_once else b""))
        response = b""
        if not is_sent_at_once:
            response = connection.read_until(b"data: ")
            connection.send(bad)
        response += connection.read_to_end()
    assert response.count(b"HTTP/1.1") <= 1 and b"invalid_request" not in response


def test_a_client_that_leaves_with_a_request_waiting_leaves_the_one_that_runs(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn tells only the latest request that its client went away."""
    values = {"model": "base", "stream": True, "max_tokens": 2000, "seconds_per_token": 0.05}
    limits = server.services.rate_limits
    with RawConnection(server.port) as connection:
        connection.send(request("POST", "/v1/completions", json.dumps(values).encode(), Authorization=KEY))
        wait_until(lambda: limits.running("alice") == 1)
        connection.send(HEALTH)
        time.sleep(0.2)  # until it was read
    wait_until(lambda: limits.running("alice") == 0)
    assert "Exception in ASGI application" not in caplog.text


def test_an_offer_of_another_protocol_is_not_taken_up(server: LocalServer) -> None:
    for offer in ("websocket", "h2c"):
        response = ask(server, request("GET", "/health", Connection="Upgrade", Upgrade=offer))
        assert status_of(response) == 200 and b"connection: close" in response.lower()


# --- time


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", 0), (b"\r\n\r\n", 0), (b"G", 408), (b"GET /health HTTP/1.1\r\nHost: local", 408)],
    ids=["nothing", "empty lines", "a byte", "half a head"],
)
def test_a_connection_without_a_whole_head_is_ended(start: Start, sent: bytes, status: int) -> None:
    server = start(header_timeout_s=1)
    with RawConnection(server.port) as connection:
        connection.send(sent)
        response = connection.read_to_end()
        assert status_of(response) == status
    assert not response or code_of(response) == "request_timeout"


def test_a_head_byte_by_byte_has_no_more_time(start: Start) -> None:
    server = start(header_timeout_s=1)
    with RawConnection(server.port) as connection:
        connection.socket.settimeout(0.2)
        connection.send(b"GET /health HTTP/1.1\r\n")
        began, response = time.monotonic(), b""
        while not response and time.monotonic() - began < 300:
            connection.send(b"X")
            try:
                response = connection.socket.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                return
        assert status_of(response) == 408


def test_a_pooled_connection_may_be_idle_for_longer_than_a_head_takes(start: Start) -> None:
    server = start(keep_alive_s=300, header_timeout_s=1.5)
    with RawConnection(server.port) as connection:
        for pause_s in (2.0, 0):
            connection.send(HEALTH)
            assert status_of(connection.read_until(b"{}")) == 200
            time.sleep(pause_s)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("settings", "sent"),
    [({"keep_alive_s": 0.3}, b""), ({"header_timeout_s": 1.5}, b"\r\n\r\n")],
    ids=["idle", "empty lines, which end uvicorn's wait"],
)
def test_an_idle_connection_is_closed_in_the_end(start: Start, settings: Any, sent: bytes) -> None:
    with RawConnection(start(**settings).port) as connection:
        connection.send(HEALTH)
        connection.read_until(b"{}")
        connection.send(sent)
        assert connection.read_to_end() == b""


@pytest.mark.parametrize(
    ("settings", "variable", "expected"),
    [({}, None, 75), ({}, "90", 90), ({"keep_alive_s": 80}, "90", 80), ({"keep_alive_s": 80}, None, 80)],
)
def test_keep_alive_outlasts_a_load_balancers(
    monkeypatch: pytest.MonkeyPatch, settings: Any, variable: str | None, expected: float
) -> None:
    monkeypatch.delenv(KEEP_ALIVE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(KEEP_ALIVE_VARIABLE, variable)
    assert limits_of(Settings(**settings)).keep_alive_s == expected


@pytest.mark.parametrize(
    ("settings", "pause_s"),
    [({"body_idle_timeout_s": 1}, None), ({"body_timeout_s": 1}, 0.1)],
    ids=["silent", "dribbling"],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("PATCH", "/v1/adapters/poet")])
def test_a_slow_body_is_408(start: Start, settings: Any, pause_s: float | None, method: str, path: str) -> None:
    server = start(**settings)
    key = bearer()["Authorization"]
    with RawConnection(server.port) as connection:
        connection.send(
            request(method, path, Authorization=key, Content_Length="5000", Content_Type="application/json")
        )
        connection.send(b'{"model"')
        connection.socket.settimeout(300 if pause_s is None else pause_s)
        began, response = time.monotonic(), b""
        while not response and time.monotonic() - began < 300:
            try:
                response = connection.socket.recv(65536)
            except TimeoutError:
                connection.send(b" ")
        assert status_of(response) == 408 and b"connection: close" in response.lower()
        connection.socket.settimeout(300)
        connection.read_to_end()
    wait_until(lambda: bool(server.lines))
    assert server.lines[-1]["status"] == 408


def test_uploads_keep_their_own_time(start: Start) -> None:
    server = start(body_idle_timeout_s=0.2, body_timeout_s=0.4, upload_idle_timeout_s=2)
    with RawConnection(server.port) as connection:
        kind = "multipart/form-data; boundary=b"
        connection.send(
            request(
                "POST", "/v1/adapters", Authorization=bearer()["Authorization"], Content_Type=kind, Content_Length="99"
            )
        )
        response = connection.read_to_end()
    assert (status_of(response), code_of(response)) == (408, "upload_timeout")


def test_a_body_that_nobody_reads_does_not_hold_the_connection(start: Start) -> None:
    server = start(body_idle_timeout_s=1)
    with RawConnection(server.port) as connection:
        connection.send(request("GET", "/health", Content_Length="1000000"))
        assert status_of(connection.read_to_end()) == 200


def test_a_client_that_reads_no_stream_is_ended(start: Start) -> None:
    server = start(write_timeout_s=1)
    body = json.dumps({"model": "base", "stream": True, "max_tokens": 10**7}).encode()
    with RawConnection(server.port, receive_bytes=4096) as connection:
        connection.send(request("POST", "/v1/completions", body, Authorization=KEY))
        wait_until(lambda: bool(server.lines))  # the request is over, though nothing was read
    wait_until(lambda: not server.connections)


def test_a_stream_takes_as_long_as_it_takes(start: Start) -> None:
    server = start(write_timeout_s=1.5, header_timeout_s=1.5, body_timeout_s=1.5, keep_alive_s=0.5)
    body = json.dumps({"model": "base", "stream": True, "max_tokens": 10, "seconds_per_token": 0.25}).encode()
    with httpx.stream("POST", f"{server.url}/v1/completions", content=body, headers=bearer("alice")) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) == 11


def test_a_tls_handshake_that_does_not_come_ends_the_connection() -> None:
    async def test() -> bytes:
        loop, context = asyncio.get_running_loop(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            return await asyncio.wait_for(reader.read(), 50)  # uvloop's own limit is a minute
        finally:
            writer.close()
            server.close()

    with asyncio.Runner(loop_factory=loop_factory(Settings(header_timeout_s=0.3))) as runner:
        assert runner.run(test()) == b""


# --- how many


def test_a_client_has_so_many_connections_and_others_have_theirs(start: Start) -> None:
    server = start(max_client_connections=20)
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(RawConnection(server.port))
        wait_until(lambda: server.connections >= 20)
        with RawConnection(server.port) as one_more:
            one_more.send(HEALTH)
            response = one_more.read_to_end()
            assert (status_of(response), code_of(response)) == (503, "too_many_connections")
            assert b"retry-after: " in response.lower()
        with socket.create_connection(("127.0.0.1", server.port), source_address=("127.0.0.2", 0)) as other:
            other.sendall(HEALTH)
            assert status_of(other.recv(65536)) == 200
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_all_clients_together_have_so_many(start: Start) -> None:
    server = start(max_connections=10, header_timeout_s=60)
    with ExitStack() as held:
        for number in range(10):
            local = (f"127.0.1.{number + 1}", 0)
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), source_address=local))
        wait_until(lambda: server.connections >= 10)
        assert status_of(ask(server, HEALTH)) == 503
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


@pytest.mark.parametrize(
    ("files", "expected"),
    [((1024, 4096), 768), ((1024, 2**20), 10_000), ((1024, -1), 10_000), ((20_000, 20_000), 10_000)],
)
def test_connections_leave_descriptors_for_all_else(
    monkeypatch: pytest.MonkeyPatch, files: tuple[int, int], expected: int
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: files)
    assert limits_of(Settings()).max_connections == expected


def test_a_trusted_proxy_has_as_many_as_it_needs(start: Start) -> None:
    server = start(max_client_connections=5, trusted_proxies="127.0.0.0/8")
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(RawConnection(server.port))
        assert_alive(server)


def test_silent_connections_go_away(start: Start) -> None:
    server = start(header_timeout_s=1, max_client_connections=200)
    with ExitStack() as held:
        for _ in range(300):
            held.enter_context(RawConnection(server.port))
        wait_until(lambda: server.connections == 0)
        assert_alive(server)


# --- streams and connections, for what is in front


def test_streams_are_not_held_back_by_proxies(server: LocalServer) -> None:
    body = {"model": "base", "stream": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer("alice"))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "connection" not in response.headers
    plain = httpx.post(f"{server.url}/v1/completions", json={"model": "base"}, headers=bearer("alice"))
    assert "x-accel-buffering" not in plain.headers


def test_a_stream_that_ends_while_the_server_drains_ends_its_connection(tmp_path: Path) -> None:
    values = {"model": "base", "stream": True, "max_tokens": 40, "seconds_per_token": 0.05}
    with in_a_process(tmp_path) as server, RawConnection(server.port) as connection:
        connection.send(request("POST", "/v1/completions", json.dumps(values).encode(), Authorization=KEY))
        connection.read_until(b"data: ")
        server.process.terminate()
        assert connection.read_to_end().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_stream_that_ends_while_draining_has_its_connection_closed(start: Start) -> None:
    """Before uvicorn closes idle connections, and though its headers were sent before."""
    server = start()
    values = {"model": "base", "stream": True, "max_tokens": 4, "seconds_per_token": 0.2}
    with RawConnection(server.port) as connection:
        for is_draining in (False, True):
            connection.send(request("POST", "/v1/completions", json.dumps(values).encode(), Authorization=KEY))
            connection.read_until(b"data: {")
            server.services.lifecycle.is_draining = is_draining
            assert connection.read_until(b"[DONE]\n\n\r\n0\r\n\r\n").endswith(b"0\r\n\r\n")
        assert connection.read_to_end() == b""


# --- the log


def test_a_client_that_leaves_before_its_body_is_whole_is_logged_as_gone(start: Start) -> None:
    server = start()
    admin = bearer()["Authorization"]
    kind = "multipart/form-data; boundary=b"
    cut_off = [("POST", "/v1/completions"), ("PATCH", "/v1/adapters/poet"), ("POST", "/v1/adapters")]
    for method, path in cut_off:
        with RawConnection(server.port) as connection:
            type_ = kind if path == "/v1/adapters" else "application/json"
            connection.send(request(method, path, Authorization=admin, Content_Length="500", Content_Type=type_))
            connection.send(b"--b\r\n" if type_ == kind else b'{"model"')
            time.sleep(0.1)
    wait_until(lambda: len(server.lines) == len(cut_off))
    assert [line["status"] for line in server.lines] == [499, 499, 499]


def test_slashes_count_once_over_a_socket_too(server: LocalServer) -> None:
    for path in (
        "//v1/models",
        "/v1/models/",
        "//v1//models//",
        "/v1/models/base/",
        "//v1/models/org/alias",
        "/metrics/",
    ):
        response = ask(server, request("GET", path, Authorization=bearer()["Authorization"], Connection="close"))
        assert status_of(response) == 200, path
    for path in ("//v1/completions", "/v1/completions/", "/v1//completions"):
        body = json.dumps({"model": "base"}).encode()
        response = ask(server, request("POST", path, body, Authorization=KEY, Connection="close"))
        assert status_of(response) == 200, path
        assert status_of(ask(server, request("POST", path, body, Connection="close"))) == 401, path
    assert code_of(ask(server, request("GET", "/v1/models/no//model/", Authorization=KEY, Connection="close"))) == (
        "model_not_found"
    )


def test_nothing_that_a_client_writes_looks_like_a_line_of_the_log(process: ServerProcess) -> None:
    forged = "x\nINFO 01-01 00:00:00 [forged.py:1] forged\r\x1b[2Kforged\u2028forged"
    quoted = "x%0aINFO forged%0d%1b[2Kforged%e2%80%a8forged"
    asked = httpx.Client(base_url=process.url, headers=bearer() | {"X-Request-Id": "x", "User-Agent": "a"})
    for path in (f"/{quoted}", f"/v1/models/{quoted}", f"/v1/adapters/{quoted}", f"/v1/adapters/{quoted}/versions/1"):
        for method in ("GET", "POST", "PATCH", "DELETE", "OPTIONS"):
            asked.request(method, path, json={"active": forged})
    for path in ("/v1/completions", "/tokenize", "/v1/responses", "/v1/chat/completions", "/v1/messages"):
        for field in ("model", "request_id", "user", "prompt", "cache_salt", forged):
            asked.post(path, json={"model": "base", field: forged})
    for name in ("x-request-id", "origin", "host", "x-forwarded-for", "user-agent", "authorization", "content-type"):
        head = f"GET /v1/models HTTP/1.1\r\n{name}: x\x0bforged\x85forged\r\nConnection: close\r\n\r\n".encode(
            "latin-1"
        )
        with RawConnection(process.port) as connection:
            connection.send(head)
            connection.read_to_end()
    files = {"config": (forged, b"{}", forged), "weights": (forged, b"x"), "name": (None, forged)}
    asked.post("/v1/adapters", files=files)  # type: ignore[arg-type]
    asked.close()
    lines = process.log.read_bytes().decode(errors="replace").split("\n")
    assert len(lines) > 40
    for line in lines:
        assert line.replace("\t", " ").isprintable(), ascii(line)
        assert not line.startswith(("INFO 01-01", "forged")), line
