"""The console's routes: the page and its files, what a reader may do, the metrics that viewers share, and the log."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from server.api.dependencies import Services
from server.auth.origin import OriginPolicy
from server.console import page
from server.console.metrics import SharedMetrics
from server.metrics import choice
from server.metrics.choice import render_choice
from server.metrics.counters import EventCounters
from server.metrics.exposition import MetricsPage
from server.metrics.snapshot import AdapterState, StateCollector, StateSnapshot
from server.middleware.access_log import AccessLog
from server.settings.model import Settings
from tests.server import tiny_server, vllm_app
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import FakeEngine
from tests.server.uploads import uploader

METRICS_KEY = "metrics-has-a-key-of-some-length"
SCRIPT = page.PageFile(b"export const one = 1;\n", page.MEDIA_TYPES["mjs"])
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file that is there, whatever the page has."""
    monkeypatch.setitem(page._FILES, "js/one.mjs", SCRIPT)


def app_of(folder: Path, **values: Any) -> FastAPI:
    return build_app(settings_of(folder / "store", **values), FakeEngine())


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return app_of(tmp_path, metrics_key=METRICS_KEY)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


def services_of(client: TestClient) -> Services:
    assert isinstance(client.app, FastAPI)
    services: Services = client.app.state.services
    return services


def ask(client: TestClient, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    """A request for exactly this path."""
    return client.request(method, f"http://127.0.0.1:8000{path}", headers=headers)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# --- the page and its files


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/", "text/html; charset=utf-8"), ("/console/js/one.mjs", "text/javascript; charset=utf-8")],
)
def test_a_file_of_the_page_needs_no_key_and_says_what_a_browser_may_do_with_it(
    client: TestClient, path: str, media_type: str
) -> None:
    answer = ask(client, path)
    assert answer.status_code == 200 and answer.headers["content-type"] == media_type
    expected = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }
    assert {name: answer.headers[name] for name in expected} == expected and "set-cookie" not in answer.headers
    again = ask(client, path, **{"if-none-match": f'"x", W/{answer.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"") and again.headers["content-security-policy"] == POLICY
    assert ask(client, path, **{"if-none-match": '"x"'}).status_code == 200


def test_head_is_get_without_the_body(client: TestClient) -> None:
    for path in ("/", "/console/js/one.mjs", "/console/session"):
        head, get = ask(client, path, "HEAD"), ask(client, path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))
    assert code(ask(client, "/", "POST")) == (405, "method_not_allowed")


def test_slashes_count_once(client: TestClient) -> None:
    plain = ask(client, "/").content
    for path in ("//", "///", "/console//js/one.mjs", "//console/js/one.mjs/"):
        answer = ask(client, path)
        assert answer.status_code == 200 and answer.content == (SCRIPT.content if "mjs" in path else plain)


@pytest.mark.parametrize(
    "path",
    [
        *("/console", "/console/", "/console/nowhere", "/console/index.html", "/console/js", "/console/js/one.mjs/x"),
        *("/console/%2e%2e/routes.py", "/console/..%2froutes.py", "/console/js/..%5cone.mjs"),
        *("/console/js/%2e%2e/js/one.mjs", "/console/js%2f..%2fone.mjs", "/console/%2e/js/one.mjs", "/console/%00"),
        *("/console//etc/passwd", "/console/%2fetc%2fpasswd", "/console/js/one.mjs%00.css", "/console/JS/one.mjs"),
        *("/console/js/one.mjs.", "/console/js/one.mjs%20", "/console/js/one.mjs;x", "/console/routes.py", "/Console"),
    ],
)
def test_what_the_page_does_not_have_is_404_in_our_shape(client: TestClient, path: str) -> None:
    answer = ask(client, path)
    assert code(answer) == (404, "not_found") and answer.headers["x-request-id"]


def test_every_file_in_the_folder_is_served_as_what_it_is(client: TestClient) -> None:
    folder = Path(page.__file__).parent / "page"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*page._FILES} - {"js/one.mjs"}, "a file of a suffix that is not in MEDIA_TYPES"
    for name in there - {page.INDEX}:
        assert ask(client, f"/console/{name}").content == (folder / name).read_bytes()
    assert ask(client, "/").content == (folder / page.INDEX).read_bytes()


@pytest.mark.parametrize(
    ("root_path", "base"),
    [
        ("/models/a", "/models/a/"),
        ("/a b", "/a%20b/"),
        ('/"><script>alert(1)</script>', "/%22%3E%3Cscript%3Ealert(1)%3C/script%3E/"),
        ("/a&b='c'", "/a&amp;b=&#x27;c&#x27;/"),
        ("//evil.example", "/evil.example/"),
        ("/\\evil.example", "/%5Cevil.example/"),
        ("/é\n", "/%C3%A9%0A/"),
    ],
)
def test_below_a_prefix_the_pages_links_begin_there(
    app: FastAPI, client: TestClient, root_path: str, base: str
) -> None:
    plain = ask(client, "/").text
    assert "<base" not in plain
    app.root_path = root_path
    answer = ask(client, "/")
    assert answer.status_code == 200 and answer.text == plain.replace("<head>", f'<head><base href="{base}">')
    assert answer.headers["content-security-policy"] == POLICY


def test_the_prefix_may_still_be_in_front_of_the_path(app: FastAPI, client: TestClient) -> None:
    app.root_path = "/models/a"
    for path in ("/models/a", "/models/a/", "/models/a//", "//models/a/"):
        assert '<base href="/models/a/">' in ask(client, path).text, path
    assert ask(client, "/models/a/console/js/one.mjs").content == SCRIPT.content
    assert ask(client, "/models/a/console/session").json()["key"] == "none"
    assert code(ask(client, "/models")) == (404, "not_found")


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with TestClient(app_of(tmp_path, console=False), "http://127.0.0.1:8000") as client:
        for path in ("/", "/console/js/one.mjs", "/console/session", "/console/metrics"):
            for method in ("GET", "HEAD", "OPTIONS"):
                assert ask(client, path, method, **bearer()).status_code == 404
            assert code(ask(client, path, **bearer())) == (404, "not_found")
        assert ask(client, "/v1/adapters", **bearer()).status_code == 200
        app = client.app
        assert isinstance(app, FastAPI)
        assert not [route for route in app.routes if getattr(route, "path", "/x") in ("/", "/console/session")]


def test_the_page_is_there_while_the_server_starts_and_while_it_ends(app: FastAPI) -> None:
    starting = TestClient(app, "http://127.0.0.1:8000")
    for path in ("/", "/console/js/one.mjs"):
        assert ask(starting, path).status_code == 200
    for path in ("/console/session", "/console/metrics"):
        answer = ask(starting, path)
        assert code(answer) == (503, "engine_unavailable") and "starting" in answer.text
    with TestClient(app, "http://127.0.0.1:8000") as client:
        services_of(client).lifecycle.is_draining = True
        assert ask(client, "/").status_code == 200 and ask(client, "/console/metrics", **bearer()).status_code == 200
        assert "shutting down" in ask(client, "/console/session").json()["engine"]
        assert ask(client, "/v1/adapters", **bearer()).status_code == 503


# --- what a reader may do


KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "made up": {"authorization": "Bearer made-up-key"},
    "api": bearer("alice"),
    "api as x-api-key": {"x-api-key": "alice-has-a-key-of-some-length"},
    "admin": bearer(),
    "metrics": {"authorization": f"Bearer {METRICS_KEY}"},
}
FROM: dict[str, dict[str, str]] = {
    "here": {},
    "the page itself": {"sec-fetch-site": "same-origin"},
    "a name that points here": {"host": "rebound.example"},
    "another port": {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
    "a proxy": {"x-forwarded-for": "10.0.0.9"},
}
SERVERS: dict[str, dict[str, Any]] = {
    "no keys": {"api_keys": (), "admin_key": None},
    "an admin key": {"api_keys": ()},
    "API keys": {"admin_key": None},
    "API and admin keys": {},
    "all keys": {"metrics_key": METRICS_KEY},
    "a metrics key": {"api_keys": (), "admin_key": None, "metrics_key": METRICS_KEY},
    "a proxy that is trusted": {"api_keys": (), "trusted_proxies": ("testclient",)},
}
SERVERS["a proxy that is trusted"]["trusted_proxies"] = ("127.0.0.1",)


@pytest.mark.parametrize("is_local", [True, False], ids=["local", "reachable"])
@pytest.mark.parametrize("server", SERVERS)
def test_may_is_what_the_routes_themselves_answer(tmp_path: Path, server: str, is_local: bool) -> None:
    app = app_of(tmp_path, **SERVERS[server])
    with TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
        if not is_local:
            object.__setattr__(services_of(client), "origin", OriginPolicy(False))
        seen = set()
        for key, origin in product(KEYS, FROM):
            headers = KEYS[key] | FROM[origin]
            told = ask(client, "/console/session", **headers)
            assert told.status_code == 200, "always"
            session = told.json()
            answers = {
                "use": ask(client, "/v1/adapters", **headers),
                "change": ask(client, "/v1/adapters/nobody", "DELETE", **headers),
                "watch": ask(client, "/console/metrics", **headers),
            }
            for deed, answer in answers.items():
                is_allowed = answer.status_code in (200, 404)
                assert session["may"][deed] == is_allowed, (key, origin, deed, answer.text)
                assert (deed in session["why_not"]) != is_allowed
                if not is_allowed:
                    said = answer.json()["error"]["message"].split(": ")[-1]
                    assert session["why_not"][deed].split(": ")[-1].split(" for /")[0] == said.split(" for /")[0]
            also = ask(client, "/v1/completions", "POST", **headers | {"content-type": "application/json"})
            assert session["may"]["use"] == (also.status_code not in (401, 403)), "inference too"
            assert ask(client, "/metrics", **headers).status_code == answers["watch"].status_code
            assert session["base"] == (["base", "org/alias"] if {"use", "watch"} - session["why_not"].keys() else [])
            assert bool(session["key_labels"]) == (session["may"]["change"] and "api_keys" not in SERVERS[server])
            seen.add(tuple(session["may"].values()))
        assert len(seen) > 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("none", (None, "none")), ("made up", (None, "unknown")), ("api", ("alice", "known")),
        ("api as x-api-key", ("alice", "known")), ("admin", ("admin", "known")), ("metrics", (None, "metrics")),
    ],
)  # fmt: skip
def test_the_session_says_what_was_presented(client: TestClient, key: str, expected: tuple[str | None, str]) -> None:
    answer = ask(client, "/console/session", **KEYS[key])
    session = answer.json()
    assert (session["label"], session["key"]) == expected and session["needs_key"] is True
    assert not any(secret.split()[-1] in answer.text for secret in KEYS[key].values())
    assert answer.headers["cache-control"] == "no-store"
    assert session["limits"] == {"max_adapter_bytes": 1024**2, "drain_timeout_s": 300.0, "max_model_len": 512}
    assert session["vllm"][0].isdigit() and session["version"] and session["following"] is session["engine"] is None


def test_the_session_says_that_the_engine_died(client: TestClient) -> None:
    services_of(client).engine_health.death = "the engine died: it was killed"
    assert ask(client, "/console/session").json()["engine"] == "the engine died: it was killed"


# --- the metrics that viewers share


class Page:
    """Counts what is asked of it. gate: renderings wait for it."""

    def __init__(self) -> None:
        self.refreshed, self.rendered = 0, list[str | None]()
        self.gate: asyncio.Event = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def refresh(self) -> None:
        self.refreshed += 1
        await self.gate.wait()

    def choice(self, adapter: str | None) -> bytes:
        self.rendered.append(adapter)
        if self.error is not None:
            raise self.error
        return f"{adapter} {len(self.rendered)}".encode()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_twenty_viewers_cause_one_rendering_a_second() -> None:
    viewed, clock = Page(), Clock()

    async def watch() -> None:
        shared = SharedMetrics(viewed, clock)
        for second in range(10):
            for viewer in range(20):
                clock.now = second + viewer / 25
                plain, gzipped = await shared.text()
                assert gzip.decompress(gzipped) == plain == f"None {second + 1}".encode()

    asyncio.run(watch())
    assert viewed.rendered == [None] * 10 and viewed.refreshed == 0


def test_those_who_ask_at_once_wait_for_one_rendering() -> None:
    viewed, clock = Page(), Clock()

    async def watch() -> None:
        shared = SharedMetrics(viewed, clock)
        viewed.gate.clear()
        viewers = [asyncio.create_task(shared.text("poet")) for _ in range(20)]
        for _ in range(5):
            await asyncio.sleep(0)
            clock.now += 1  # slower than a second: none is begun beside the one that runs
            viewers.append(asyncio.create_task(shared.text("poet")))
        viewers.pop(0).cancel()  # one who leaves takes nothing from the others
        viewed.gate.set()
        assert {plain for plain, _ in await asyncio.gather(*viewers)} == {b"poet 1"}

    asyncio.run(watch())
    assert viewed.rendered == ["poet"] and viewed.refreshed == 1


def test_one_adapter_is_rendered_once_a_second_and_the_workers_are_asked_once() -> None:
    viewed, clock = Page(), Clock()

    async def watch() -> None:
        shared = SharedMetrics(viewed, clock)
        for _ in range(3):
            for adapter in (None, "poet", "clerk"):
                await shared.text(adapter)
        clock.now = 5.0
        await shared.text("poet")
        assert {*shared._rendered._latest} == {"poet"}, "what is old is not kept"

    asyncio.run(watch())
    assert viewed.rendered == [None, "poet", "clerk", "poet"] and viewed.refreshed == 2


def test_a_rendering_that_fails_is_tried_again_a_second_later() -> None:
    viewed, clock = Page(), Clock()

    async def watch() -> None:
        shared = SharedMetrics(viewed, clock)
        viewed.error = RuntimeError("no")
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await shared.text()
        viewed.error, clock.now = None, 1.0
        assert (await shared.text())[0] == b"None 2"

    asyncio.run(watch())


def test_nothing_runs_while_nobody_asks() -> None:
    viewed, clock = Page(), Clock()

    async def watch() -> None:
        shared = SharedMetrics(viewed, clock)
        before = asyncio.all_tasks()
        await shared.text()
        await asyncio.sleep(0.01)
        clock.now = 100.0
        assert asyncio.all_tasks() == before

    asyncio.run(watch())
    assert viewed.rendered == [None]


def series(answer: httpx.Response) -> dict[str, list[dict[str, str]]]:
    assert answer.status_code == 200, answer.text
    found: dict[str, list[dict[str, str]]] = {}
    for family in parse(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_the_choice_is_written_as_the_library_writes_it() -> None:
    registry, base = CollectorRegistry(), 'a "base" \\ of\ntwo lines'
    counters = EventCounters(registry, base_name=base)
    for name in ("poet", None):
        counters.request_finished(name, "stop", 3, 4, 0.5)
        counters.first_token(name, 0.75)
        counters.inter_token(name, 1e-7)
    registry.register(StateCollector(counters, lambda: StateSnapshot({base: AdapterState(running=2)}, 1)))
    theirs = CollectorRegistry()
    Gauge("vllm:num_requests_running", f"What is {base}", registry=theirs).set(3)
    page = MetricsPage(registry, theirs)
    found = render_choice(page, lambda _: None).decode().splitlines()
    expected = generate_latest(page.restricted_registry([line.split("{")[0].split(" ")[0] for line in found])).decode()
    missing = {*expected.splitlines()} - {*found}
    assert {*found} <= {*expected.splitlines()} and len(found) == len({*found})
    assert all(line.startswith((*choice.COUNTED, *choice.SUMMED)) and line.endswith(" 0.0") for line in missing)
    assert {"perft_adapter_requests_running", "vllm:num_requests_running"} <= {
        line.split(" ")[0].split("{")[0] for line in found
    }
    assert len([line for line in missing if "perft_adapter_requests_total{" in line]) > 10, "what never counted"
    assert len([line for line in found if "perft_adapter_requests_total{" in line]) == 2
    fresh = CollectorRegistry()
    EventCounters(fresh)
    nothing = render_choice(MetricsPage(fresh, CollectorRegistry()), lambda _: None).decode()
    assert 'perft_adapter_requests_total{adapter="_base",finish_reason="stop"} 0.0' in nothing, "0, and not unknown"


def test_a_rendering_rests_between_short_pieces_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, rests = CollectorRegistry(), list[float]()
    counters = EventCounters(registry)
    for number in range(50):
        counters.first_token(f"poet-{number}", 0.75)
    page = MetricsPage(registry, CollectorRegistry())
    at_once = render_choice(page, lambda _: None)
    monkeypatch.setattr(choice, "WORK_S", -1.0)  # each piece is long
    monkeypatch.setattr(choice.time, "sleep", rests.append)
    assert render_choice(page, lambda _: None) == at_once
    assert len(rests) > 100 and {*rests} == {choice.REST_S}


def test_the_choice_is_part_of_the_whole_page(client: TestClient, tmp_path: Path) -> None:
    upload = uploader(client, tmp_path)
    client.headers = httpx.Headers(bearer())
    upload("poet", 0), upload("clerk", 1)
    services_of(client).metrics.request_finished("poet", "stop", 3, 4, 0.5)
    services_of(client).metrics.first_token("poet", 0.25)
    ask(client, "/metrics")  # what is loaded takes its label at a scrape
    whole, chosen = (
        {(s.name, *sorted(s.labels.items())): s.value for family in parse(text) for s in family.samples}
        for text in (ask(client, "/metrics").text, ask(client, "/console/metrics").text)
    )
    assert chosen and all(whole[key] == value for key, value in chosen.items() if "free_bytes" not in key[0])
    names = {key[0] for key in chosen}
    assert "perft_adapter_time_to_first_token_seconds_sum" in names and "perft_adapter_load_seconds_bucket" in names
    assert "process_start_time_seconds" in names, "a page sees by it that the server was started again"
    assert not [name for name in names if name.endswith("_created") or "expert" in name or "e2e" in name]
    assert "perft_adapter_time_to_first_token_seconds_bucket" not in names
    assert chosen["perft_adapter_time_to_first_token_seconds_count", ("adapter", "poet")] == 1


def test_one_adapter_has_all_its_series_and_no_other(client: TestClient, tmp_path: Path) -> None:
    upload = uploader(client, tmp_path)
    client.headers = httpx.Headers(bearer())
    upload("poet", 0), upload("clerk", 1)
    metrics: Any = services_of(client).metrics
    for name in ("poet", "clerk"):
        metrics.request_finished(name, "stop", 3, 4, 0.5)
        metrics.experts_worked(name, [1, 2])
    found = series(ask(client, "/console/metrics?adapter=poet"))
    assert all(labels["adapter"] == "poet" for each in found.values() for labels in each)
    assert {labels["expert"] for labels in found["perft_expert_tokens_total"]} == {"0", "1"}
    assert {"+Inf", "0.01"} <= {labels["le"] for labels in found["perft_adapter_time_to_first_token_seconds_bucket"]}
    assert {"perft_adapter_requests_running", "perft_adapter_requests_waiting", "perft_adapter_e2e_seconds_sum"} <= {
        *found
    }
    whole = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in parse(ask(client, "/metrics").text)
        for s in family.samples
    }
    for family in parse(ask(client, "/console/metrics?adapter=poet").text):
        assert all(whole[(s.name, *sorted(s.labels.items()))] == s.value for s in family.samples)
    assert "perft_adapter_requests_total" in series(ask(client, "/console/metrics?adapter=base"))
    for nobody in ("nobody", "", "%00", "po", "poet@1"):
        assert series(ask(client, f"/console/metrics?adapter={nobody}")) == {}, nobody


def test_the_metrics_are_compressed_if_asked(client: TestClient) -> None:
    plain = ask(client, "/console/metrics", **bearer() | {"accept-encoding": "identity"})
    packed = ask(client, "/console/metrics", **bearer() | {"accept-encoding": "br, gzip"})
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert plain.text == packed.text and plain.headers["vary"] == "Accept-Encoding"
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_they_are_there_with_a_listener_for_metrics(tmp_path: Path) -> None:
    with TestClient(app_of(tmp_path, metrics_bind="127.0.0.1:0"), "http://127.0.0.1:8000") as client:
        assert code(ask(client, "/metrics", **bearer())) == (404, "not_found")
        assert "perft_moe_layers" in series(ask(client, "/console/metrics", **bearer()))
        assert code(ask(client, "/console/metrics", **bearer("alice"))) == (403, "forbidden")
        assert ask(client, "/console/session", **bearer()).json()["may"]["watch"]


# --- the log


def test_an_open_console_leaves_a_line_a_minute_and_all_else_a_line_each(client: TestClient) -> None:
    stream = io.StringIO()
    object.__setattr__(services_of(client), "access_log", AccessLog("json", stream))
    own = bearer("alice") | {"sec-fetch-site": "same-origin"}
    for _ in range(30):
        ask(client, "/"), ask(client, "/console/js/one.mjs"), ask(client, "/console/session", **own)
        ask(client, "/console/session", **bearer()), ask(client, "/console/metrics", **bearer())
        ask(client, "/v1/adapters?limit=1", **own)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["path"], line["label"]) for line in lines] == [
        ("/", None), ("/console/{file:path}", None), ("/console/session", "alice"), ("/console/session", "admin"),
        ("/console/metrics", "admin"), ("/v1/adapters", "alice"),
    ]  # fmt: skip
    for _ in range(3):
        ask(client, "/console/nowhere"), ask(client, "/console/metrics", **own)
        ask(client, "/v1/adapters", **bearer("alice")), ask(client, "/v1/adapters/nobody", **own)
        ask(client, "/v1/adapters/nobody", "DELETE", **bearer() | {"sec-fetch-site": "same-origin"})
    assert len(stream.getvalue().splitlines()) == len(lines) + 15, "what fails, asks without a page, or changes"
    for number in range(3):
        ask(client, "/console/session", authorization=f"Bearer a-guessed-key-{number}")
        ask(client, "/console/metrics", authorization=f"Bearer {METRICS_KEY}")
    assert len(stream.getvalue().splitlines()) == len(lines) + 19, "each guess of a key has a line"


# --- vLLM's own app


@asynccontextmanager
async def asker(model: Path, folder: Path, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(adapter_store=folder / "store")
    async with vllm_app.running(model, settings, FakeEngine()) as world:
        world.app.root_path = root_path
        transport = httpx.ASGITransport(world.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            yield client


def test_vllms_app_serves_it_too(tiny_model: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with asker(tiny_model, tmp_path, "/prefix") as client:
            assert '<base href="/prefix/">' in (await client.get("/prefix/")).text
            session = (await client.get("/console/session")).json()
            assert session["may"] == {"use": True, "change": True, "watch": True}
            assert session["base"] == [tiny_server.BASE_NAME]
            assert "perft_moe_layers" in (await client.get("/console/metrics")).text
            assert (await client.get("/console/..%2f..%2fsetup.py")).status_code == 404
            assert (await client.get("/docs")).status_code == 404
            paths = (await client.get("/openapi.json")).json()["paths"]
            assert not [path for path in paths if path == "/" or path.startswith("/console")]

    asyncio.run(check())
