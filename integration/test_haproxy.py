"""The HAProxy configuration of deploy/, in a real HAProxy before three small servers, and before one of ours."""

import http.client
import json
import re
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from integration import haproxy
from integration.haproxy import HAProxy
from integration.replicas import Replica, Request, digest_of, replicas
from server.middleware.request_path import one_path
from tests.server.fake_server import bearer
from tests.server.fakes import BASE
from tests.server.local_server import local_server
from tests.server.processes import LIMIT_S, free_port, wait_until
from tests.server.raw_connection import RawConnection, request, status_of
from tests.synthetic import write_adapter

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
NAMES = [f"tenant-{number}" for number in range(60)]
BUFFER_BYTES = int(re.findall(r"tune\.bufsize (\d+)", haproxy.DEPLOYED.read_text())[0])


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Replica]]:
    with replicas(3) as started:
        yield started


@pytest.fixture(scope="module")
def running(servers: list[Replica], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    with haproxy.before(tmp_path_factory.mktemp("haproxy"), [server.port for server in servers]) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: HAProxy, servers: list[Replica]) -> Iterator[HAProxy]:
    """With all servers up, at rest and at full weight."""
    wait_until(lambda: set(running.states().values()) == {"UP"})
    for server in servers:
        running.command(f"set weight perft/{server.name} 100%")
        server.requests.clear()
    begins = len(running.log)
    yield running
    print(running.log[begins:])  # shown where the test failed
    for server in servers:
        server.reset()
        if not server.is_listening():
            server.start()
    wait_until(lambda: set(running.states().values()) == {"UP"} and not any(running.running().values()))


CLIENT = httpx.Client(timeout=LIMIT_S, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
"""A connection for each request."""


def post(proxy: HAProxy, body: bytes | dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
    """Its answer, once HAProxy no longer counts it as running: a home that is counted busy passes the next one on."""
    others = sum(proxy.running().values())
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = CLIENT.post(f"http://127.0.0.1:{proxy.port}{path}", content=content, headers=sent)
    wait_until(lambda: sum(proxy.running().values()) <= others, pause_s=0.005)
    return answer


def server_of(response: httpx.Response) -> str:
    """Who answered."""
    assert response.status_code == 200, response.text
    name: str = response.json()["server"]
    return name


def answers_of_all(ask: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """Ask until each of three servers has answered: one that came back gets few requests at first (slowstart)."""
    answers = list[httpx.Response]()

    def all_have_answered() -> bool:
        answers.append(ask())
        return {server_of(answer) for answer in answers} == {"r1", "r2", "r3"}

    wait_until(all_have_answered, pause_s=0.0)
    return answers


def home_of(proxy: HAProxy, name: str) -> str:
    return server_of(post(proxy, {"model": name}))


def homes_of(proxy: HAProxy) -> dict[str, str]:
    return {name: home_of(proxy, name) for name in NAMES}


def named(servers: list[Replica], name: str) -> Replica:
    (found,) = (server for server in servers if server.name == name)
    return found


def arrived(servers: list[Replica]) -> list[Request]:
    return [request for server in servers for request in server.requests]


@contextmanager
def streaming(proxy: HAProxy, home: Replica, model: str) -> Iterator[Iterator[str]]:
    """A stream of `model` from its home, line by line, once that has begun it."""
    home.holds = True
    url = f"http://127.0.0.1:{proxy.port}{CHAT}"
    with CLIENT.stream("POST", url, json={"model": model, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream"
        yield (line for line in response.iter_lines() if line)


def test_haproxy_accepts_the_configuration_without_a_warning() -> None:
    assert haproxy.warnings_of(haproxy.DEPLOYED) == ""


def test_an_adapter_has_one_home_and_homes_are_spread(proxy: HAProxy) -> None:
    homes = homes_of(proxy)
    assert homes_of(proxy) == homes
    assert min(Counter(homes.values()).values()) >= 8 and len(set(homes.values())) == 3


def test_versions_and_routes_of_an_adapter_go_to_its_home(proxy: HAProxy) -> None:
    for name in NAMES[:10]:
        home = home_of(proxy, name)
        for route in ROUTES:
            for model in (name, f"{name}@1", f"{name}@7"):
                answer = post(proxy, {"model": model}, route)
                assert server_of(answer) == home and answer.json()["path"] == route


def test_many_requests_of_one_adapter_are_spread(proxy: HAProxy, servers: list[Replica]) -> None:
    home = home_of(proxy, "hot")
    for server in servers:
        server.holds = True
    with ThreadPoolExecutor(60) as clients:
        answers = [clients.submit(post, proxy, {"model": "hot"}) for _ in range(60)]
        wait_until(lambda: sum(server.running for server in servers) == 60)
        running = {server.name: server.running for server in servers}
        for server in servers:
            server.holds = False
        assert {server_of(answer.result()) for answer in answers} == {"r1", "r2", "r3"}
    assert running[home] == max(running.values()) <= 60 / 3 * 1.25 + 1 and min(running.values()) > 0


def test_adapters_of_a_dead_server_move_and_no_other_does(proxy: HAProxy, servers: list[Replica]) -> None:
    """Before HAProxy has found out, and after; no request fails. Once the server is back, so are they."""
    before = homes_of(proxy)
    dead = servers[1]
    dead.stop()
    found_out = homes_of(proxy)
    wait_until(lambda: proxy.states()[dead.name] == "DOWN")
    down = homes_of(proxy)
    assert homes_of(proxy) == down
    moved = {name for name in NAMES if before[name] == dead.name}
    for homes in (found_out, down):
        assert {name for name in NAMES if homes[name] != before[name]} == moved
        assert len({homes[name] for name in moved}) == 2
    dead.start()
    wait_until(lambda: homes_of(proxy) == before)


def test_what_a_server_may_have_run_is_never_repeated(tmp_path: Path) -> None:
    """Each server takes the request and closes without a byte."""
    taken: list[str] = []

    class Breaking(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode()
            if line.startswith("GET /ready"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif line:
                taken.append(line)

    ports = []
    breaking = []
    for _ in range(3):
        ports.append(free_port())
        server = socketserver.ThreadingTCPServer(("127.0.0.1", ports[-1]), Breaking)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        breaking.append(server)
    with haproxy.before(tmp_path, ports) as proxy:
        answer = post(proxy, {"model": "a"})
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "engine_unavailable"
        assert len(taken) == 1
    for server in breaking:
        server.shutdown()
        server.server_close()


def test_a_draining_server_gets_nothing_new_while_its_streams_finish(proxy: HAProxy, servers: list[Replica]) -> None:
    before = homes_of(proxy)
    draining = named(servers, before["tenant-0"])
    with streaming(proxy, draining, "tenant-0") as lines:
        draining.events_allowed = 1
        assert next(lines) == f"data: {draining.name} 0"
        draining.is_ready = False
        wait_until(lambda: proxy.states()[draining.name] == "DOWN")
        meanwhile = homes_of(proxy)
        assert draining.name not in meanwhile.values()
        assert all(meanwhile[name] == before[name] for name in NAMES if before[name] != draining.name)
        draining.events_allowed = 2
        assert next(lines) == f"data: {draining.name} 1"
        draining.holds = False
        assert list(lines) == ["data: [DONE]"]


def test_an_operator_drains_a_server_before_it_is_stopped(proxy: HAProxy, servers: list[Replica]) -> None:
    before = homes_of(proxy)
    proxy.command("set server perft/r1 state drain")
    assert "r1" not in homes_of(proxy).values()
    proxy.command("set server perft/r1 state ready")
    wait_until(lambda: homes_of(proxy) == before)


def test_each_event_of_a_stream_is_passed_on_at_once(proxy: HAProxy, servers: list[Replica]) -> None:
    """The next one is only sent once this one has been read."""
    home = named(servers, home_of(proxy, "tenant-1"))
    with streaming(proxy, home, "tenant-1") as lines:
        for number in range(20):
            home.events_allowed = number + 1
            assert next(lines) == f"data: {home.name} {number}"
        home.holds = False
        assert list(lines) == ["data: [DONE]"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_server(
    proxy: HAProxy, servers: list[Replica], streams: bool
) -> None:
    home = named(servers, home_of(proxy, "tenant-2"))
    home.requests.clear()
    home.holds = True
    body = json.dumps({"model": "tenant-2", "stream": streams}).encode()
    with RawConnection(proxy.port) as client:
        client.send(request("POST", CHAT, body, Content_Type="application/json"))
        wait_until(lambda: home.running == 1)
        if streams:
            home.events_allowed = 1
            assert client.read_until(f"data: {home.name} 0".encode()).startswith(b"HTTP/1.1 200")
    wait_until(lambda: home.requests[0].is_gone and home.running == 0)


def padding(size: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x" * size, "model": "not-this-one"}]}


def test_the_name_is_found_as_far_as_the_buffer_reaches(proxy: HAProxy, servers: list[Replica]) -> None:
    """Before a megabyte, and behind what still fits; every body arrives as it was sent."""
    for name in NAMES[:10]:
        home = home_of(proxy, name)
        for body in (
            {"model": f"{name}@3"} | padding(2**20),
            padding(BUFFER_BYTES - 8192) | {"model": name},
            {"model": name, "tools": {"model": "not-this-one"}},
        ):
            sent = json.dumps(body).encode()
            answer = post(proxy, sent)
            assert server_of(answer) == home
            assert answer.json()["digest"] == digest_of(sent)


UNNAMED = {
    "behind what the buffer holds": json.dumps(padding(2**20) | {"model": "a"}).encode(),
    "no model": b'{"prompt": "x", "nested": {"model": "a"}}',
    "null": b'{"model": null}',
    "an object": b'{"model": {"model": "a"}}',
    "no JSON": b'model=a&{"model',
    "no end": b'{"prompt": "x',
    "a list": b'[{"model": "a"}]',
    "nothing": b"",
    "no text": bytes(range(256)),
}


@pytest.mark.parametrize("body", UNNAMED.values(), ids=UNNAMED.keys())
def test_bodies_without_a_name_are_passed_on_whole_to_any_server(
    proxy: HAProxy, servers: list[Replica], body: bytes
) -> None:
    answers = answers_of_all(lambda: post(proxy, body))
    assert {answer.json()["digest"] for answer in answers} == {digest_of(body)}


def test_requests_without_a_body_go_to_every_server(proxy: HAProxy, servers: list[Replica]) -> None:
    url = f"http://127.0.0.1:{proxy.port}/v1/adapters"
    answers_of_all(lambda: CLIENT.get(url))


def test_chunked_bodies_name_their_adapter_too(proxy: HAProxy, servers: list[Replica]) -> None:
    for name in NAMES[:5]:
        body = json.dumps({"prompt": "x" * 5_000, "model": name}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=LIMIT_S)
        parts = [body[start : start + 700] for start in range(0, len(body), 700)]
        connection.request("POST", CHAT, iter(parts), {"Content-Type": "application/json"}, encode_chunked=True)
        found = json.loads(connection.getresponse().read())
        connection.close()
        assert found["server"] == home_of(proxy, name) and found["digest"] == digest_of(body)


def test_one_connection_reaches_every_home(proxy: HAProxy, servers: list[Replica]) -> None:
    """One after another, and sent all at once."""
    homes = homes_of(proxy)
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", timeout=LIMIT_S) as client:
        assert {name: server_of(client.post(CHAT, json={"model": name})) for name in NAMES} == homes
    bodies = [json.dumps({"model": name}).encode() for name in NAMES[:20]]
    last = request("POST", CHAT, json.dumps({"model": NAMES[20]}).encode(), Connection="close")
    with RawConnection(proxy.port) as client:
        client.send(b"".join(request("POST", CHAT, body) for body in bodies) + last)
        found = re.findall(rb'"server": "(\w+)"', client.read_to_end())
    assert [name.decode() for name in found] == [homes[name] for name in NAMES[:21]]


def test_an_upload_is_passed_on_while_it_comes(proxy: HAProxy, servers: list[Replica]) -> None:
    """Its second half is only sent once the first has arrived."""
    half = b"x" * (BUFFER_BYTES // 4)
    with RawConnection(proxy.port) as client:
        client.send(request("POST", "/v1/adapters", b"", Content_Length=str(2 * len(half)),
                            Content_Type="multipart/form-data; boundary=b", Connection="close") + half)  # fmt: skip
        wait_until(lambda: [len(request.body) for request in arrived(servers)] == [len(half)])
        client.send(half)
        answer = client.read_to_end()
    assert status_of(answer) == 200 and digest_of(half + half).encode() in answer


METRICS = ("/metrics", "//metrics", "/metrics/", "///metrics//", "/%6detrics", "/%2Fmetrics", "/metrics?name[]=a")
METRICS_TOO = ("/metrics%2f", "http://localhost/metrics", "/METRICS")


@pytest.mark.parametrize("path", METRICS + METRICS_TOO)
def test_the_metrics_of_a_server_are_not_to_be_had(proxy: HAProxy, servers: list[Replica], path: str) -> None:
    with RawConnection(proxy.port) as client:
        client.send(request("GET", path, Connection="close"))
        assert status_of(client.read_to_end()) == 404
    assert arrived(servers) == []


def test_a_refused_path_is_answered_like_an_unknown_one(proxy: HAProxy) -> None:
    answer = CLIENT.get(f"http://127.0.0.1:{proxy.port}/metrics")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_every_path_that_our_server_takes_for_metrics_is_refused(proxy: HAProxy, servers: list[Replica]) -> None:
    """Over spellings made of slashes, dots, escapes and other names."""
    pieces = ("/", "//", "/./", "/../", "/%2F", "/;", "/%2e/", "/v1/")
    names = ("metrics", "m%65trics")
    for path in (f"{first}{name}{last}" for first in pieces for name in names for last in ("", *pieces)):
        decoded = httpx.URL(f"http://a{path}").path if "/." not in path else path.replace("%65", "e")
        meant = str(one_path({"type": "http", "path": decoded}).get("path", decoded))
        with RawConnection(proxy.port) as client:
            client.send(request("GET", path, Connection="close"))
            status = status_of(client.read_to_end())
        assert status == 404 if meant == "/metrics" else status == 200, path


def test_a_client_cannot_say_who_it_is(proxy: HAProxy, servers: list[Replica]) -> None:
    post(proxy, {"model": "a"}, X_Forwarded_For="198.51.100.7, 10.0.0.1")
    (seen,) = arrived(servers)
    assert seen.forwarded_for == ["127.0.0.1"]


def test_errors_of_the_proxy_are_json_that_says_when_to_retry(proxy: HAProxy, servers: list[Replica]) -> None:
    for server in servers:
        server.is_ready = False
    wait_until(lambda: set(proxy.states().values()) == {"DOWN"})
    answer = post(proxy, {"model": "a"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "engine_unavailable"


def test_the_log_names_the_adapter_and_no_key(proxy: HAProxy, servers: list[Replica]) -> None:
    home = home_of(proxy, "tenant-3")
    post(proxy, {"model": "evil\nline\x1b[2J@7", "prompt": "private"}, Authorization="Bearer private")
    wait_until(lambda: "evil" in proxy.log)
    assert re.search(rf" {home} adapter=tenant-3 200 ", proxy.log)
    assert "adapter=evil%0Aline%1B%5B2J 200 " in proxy.log and "private" not in proxy.log


def test_our_own_server_knows_its_clients_behind_it(tmp_path: Path) -> None:
    """An upload through the proxy, then a request; the audit log has the client's address, and /metrics is refused."""
    (tmp_path / "haproxy").mkdir()
    with (
        local_server(tmp_path, trusted_proxies="127.0.0.1", audit_log=tmp_path / "audit.jsonl") as server,
        haproxy.before(tmp_path / "haproxy", [server.port]) as proxy,
    ):
        wait_until(lambda: proxy.states()["r1"] == "UP")
        content = write_adapter(tmp_path / "given", BASE, 1)
        files = {
            part: (name, (content / name).read_bytes())
            for part, name in {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}.items()
        }
        with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", timeout=LIMIT_S, headers=bearer()) as client:
            made = client.post(
                "/v1/adapters", data={"name": "maths"}, files=files, headers={"X-Forwarded-For": "198.51.100.7"}
            )
            assert made.status_code == 201, made.text
            answer = client.post("/v1/completions", json={"model": "maths@1", "prompt": "1 + 1"})
            assert answer.json()["model"] == "maths@1"
            assert client.get("/metrics").status_code == 404
            assert CLIENT.get(f"{server.url}/metrics", headers=bearer()).status_code == 200
        (entry,) = (json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines())
        assert entry["client"] == "127.0.0.1" and entry["name"] == "maths"


def test_a_socket_that_says_nothing_is_closed(proxy: HAProxy) -> None:
    """The proxy answers 408, or closes, after `timeout http-request`."""
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.settimeout(LIMIT_S)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        assert client.recv(65536)[:12] in (b"", b"HTTP/1.1 408")
