"""Our metrics on the page as Prometheus reads it: names, types, labels, the cap, and an independent count."""

import asyncio
import gzip
import random
import re
import threading
import tracemalloc
from collections import Counter as Count
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.parser import text_string_to_metric_families as parse

from server.app.connections import METRICS_CONNECTIONS, serve_metrics
from server.connections.listener import Listener
from server.errors import StartError
from server.metrics.counters import EventCounters
from server.metrics.exposition import MetricsPage, clear_vllms_adapter_lists, render
from server.metrics.snapshot import (
    MAX_LIST_CHARACTERS,
    AdapterState,
    StateCollector,
    StateSnapshot,
    device_capacity,
)
from server.settings.model import Settings
from tests.server.processes import free_port
from tests.server.raw_connection import RawConnection, status_of

TYPES = {
    "perft_adapter_requests_total": ("counter", {"adapter", "finish_reason"}),
    "perft_adapter_prompt_tokens_total": ("counter", {"adapter"}),
    "perft_adapter_generation_tokens_total": ("counter", {"adapter"}),
    "perft_adapter_time_to_first_token_seconds": ("histogram", {"adapter", "le"}),
    "perft_adapter_inter_token_latency_seconds": ("histogram", {"adapter", "le"}),
    "perft_adapter_e2e_seconds": ("histogram", {"adapter", "le"}),
    "perft_adapter_requests_running": ("gauge", {"adapter"}),
    "perft_adapter_requests_waiting": ("gauge", {"adapter"}),
    "perft_adapter_resident": ("gauge", {"adapter", "tier"}),
    "perft_adapter_load_seconds": ("histogram", {"tier", "le"}),
    "perft_adapter_loads_total": ("counter", {"result"}),
    "perft_adapter_evictions_total": ("counter", {"tier"}),
    "perft_uploads_total": ("counter", {"result"}),
    "perft_device_rows_used": ("gauge", set()),
    "perft_device_rows_total": ("gauge", set()),
    "perft_store_bytes": ("gauge", set()),
    "perft_store_free_bytes": ("gauge", set()),
    "perft_expert_tokens_total": ("counter", {"adapter", "expert"}),
    "perft_moe_layers": ("gauge", set()),
    "perft_ready": ("gauge", set()),
    "perft_store_silent_seconds": ("gauge", set()),
    "perft_store_names_behind": ("gauge", set()),
    "perft_step_load_bytes_total": ("counter", set()),
    "perft_residency_repairs_total": ("counter", {"tier"}),
    "vllm:lora_requests_info": ("gauge", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
    "vllm:lora_adapter_loaded": ("gauge", {"adapter_name", "level", "pinned", "rank"}),
    "vllm:num_gpu_loaded_lora_adapters": ("gauge", {"model_name"}),
    "vllm:max_gpu_lora_adapters": ("gauge", {"model_name"}),
}
BASE = "org/base"
SNAPSHOT = StateSnapshot(
    {
        "poet": AdapterState(running=2, waiting=1, tier="device"),
        "clerk": AdapterState(waiting=3, tier="disk"),
        "spare": AdapterState(tier="host"),
        "draft": AdapterState(tier=None),
    },
    max_lora=8, base_running=4, device_rows_used=30, device_rows_total=100, store_bytes=7_000,
    store_free_bytes=93_000, moe_layers=2, step_load_bytes=0, is_ready=True, store_silent_s=0.25, store_names_behind=2,
)  # fmt: skip


class Metrics:
    """Both halves on one page, with a snapshot that a test may replace."""

    def __init__(self, max_adapters: int = 500, is_known: Callable[[str], bool] | None = None) -> None:
        self.ours, self.theirs = CollectorRegistry(), CollectorRegistry()
        self.state = SNAPSHOT
        self.events = EventCounters(self.ours, max_adapters, base_name=BASE, is_known=is_known)
        self.ours.register(StateCollector(self.events, lambda: self.state))
        self.page = MetricsPage(self.ours, self.theirs)
        app = FastAPI()

        @app.get("/metrics")
        def metrics(request: Request) -> Response:
            names, encoding = request.query_params.getlist("name[]"), request.headers.get("accept-encoding", "")
            body, headers = render(self.page, names, encoding)
            return Response(body, headers=headers)

        self.client = TestClient(app)

    def text(self) -> str:
        return self.client.get("/metrics", headers={"accept-encoding": "identity"}).text

    def samples(self) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
        found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in parse(self.text()):
            for sample in family.samples:
                series = found.setdefault(sample.name, {})
                key = frozenset(sample.labels.items())
                assert key not in series, f"{sample.name}{sample.labels} is there twice"
                series[key] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get(name, {}).get(frozenset(labels.items()))

    def adapters_shown(self) -> set[str]:
        return set(re.findall(r'adapter="([^"]*)"', self.text()))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def finish(metrics: Metrics, adapter: str | None, reason: str = "stop") -> None:
    metrics.events.request_finished(adapter, reason, 10, 5, 0.7)


def test_names_types_and_labels_are_those_of_the_contract(metrics: Metrics) -> None:
    metrics.events.experts_worked("poet", [10, 0, 5])
    said = dict(re.findall(r"^# TYPE (\S+) (\S+)$", metrics.text(), re.MULTILINE))
    assert said == {name: kind for name, (kind, _) in TYPES.items()}
    for name, series in metrics.samples().items():
        family = re.sub(r"_(bucket|sum|count)$", "", name) if name not in TYPES else name
        labels = {label for key in series for label, _ in key}
        assert labels == TYPES[family][1] - (set() if name.endswith("_bucket") else {"le"}), name


def test_an_ended_request_is_counted_under_its_adapter(metrics: Metrics) -> None:
    finish(metrics, "poet", "length")
    assert metrics.value("perft_adapter_requests_total", adapter="poet", finish_reason="length") == 1
    assert metrics.value("perft_adapter_requests_total", adapter="poet", finish_reason="stop") == 0
    assert metrics.value("perft_adapter_prompt_tokens_total", adapter="poet") == 10
    assert metrics.value("perft_adapter_generation_tokens_total", adapter="poet") == 5
    assert metrics.value("perft_adapter_e2e_seconds_sum", adapter="poet") == 0.7
    assert metrics.value("perft_adapter_e2e_seconds_bucket", adapter="poet", le="0.5") == 0
    assert metrics.value("perft_adapter_e2e_seconds_bucket", adapter="poet", le="1.0") == 1


def test_a_request_without_an_adapter_is_the_bases(metrics: Metrics) -> None:
    finish(metrics, None)
    finish(metrics, BASE)
    assert metrics.value("perft_adapter_requests_total", adapter=BASE, finish_reason="stop") == 2
    assert metrics.value("perft_adapter_requests_running", adapter=BASE) == 4


def test_first_and_following_tokens(metrics: Metrics) -> None:
    metrics.events.first_token("poet", 0.3)
    metrics.events.inter_token("poet", 0.02)
    metrics.events.inter_token("poet", 0.4, tokens=4)
    assert metrics.value("perft_adapter_time_to_first_token_seconds_count", adapter="poet") == 1
    assert metrics.value("perft_adapter_inter_token_latency_seconds_count", adapter="poet") == 5
    assert metrics.value("perft_adapter_inter_token_latency_seconds_sum", adapter="poet") == pytest.approx(0.42)
    assert metrics.value("perft_adapter_inter_token_latency_seconds_bucket", adapter="poet", le="0.1") == 5


def test_loads_evictions_and_uploads(metrics: Metrics) -> None:
    metrics.events.load_finished("host", 0.2, "ok")
    metrics.events.load_finished("device", 0.1, "failed")
    metrics.events.evicted("device")
    metrics.events.upload_finished("created")
    metrics.events.upload_finished("invalid_adapter")
    assert metrics.value("perft_adapter_loads_total", result="ok") == 1
    assert metrics.value("perft_adapter_loads_total", result="failed") == 1
    assert metrics.value("perft_adapter_load_seconds_count", tier="host") == 1
    assert metrics.value("perft_adapter_load_seconds_count", tier="device") == 0, "a failed load has no duration"
    assert metrics.value("perft_adapter_evictions_total", tier="device") == 1
    assert metrics.value("perft_adapter_evictions_total", tier="host") == 0
    assert metrics.value("perft_uploads_total", result="created") == 1
    assert metrics.value("perft_uploads_total", result="invalid_adapter") == 1


def test_labels_that_no_list_has_count_as_errors(metrics: Metrics) -> None:
    for number in range(50):
        finish(metrics, "poet", f"reason-{number}")
        metrics.events.upload_finished(f"result-{number}")
    assert metrics.value("perft_adapter_requests_total", adapter="poet", finish_reason="error") == 50
    assert metrics.value("perft_uploads_total", result="error") == 50
    assert "reason-1" not in metrics.text() and "result-1" not in metrics.text()


def test_the_page_agrees_with_an_independent_count() -> None:
    metrics, chance = Metrics(max_adapters=5), random.Random(3)
    names, reasons = [None, *(f"a{number}" for number in range(8))], ["stop", "length", "error"]
    requests: Count[tuple[str, str]] = Count()
    tokens: Count[str] = Count()
    for _ in range(500):
        name, reason, generated = chance.choice(names), chance.choice(reasons), chance.randrange(40)
        metrics.events.request_finished(name, reason, 3, generated, 0.1)
        requests[name or BASE, reason] += 1
        tokens[name or BASE] += generated
    shown = metrics.adapters_shown()
    assert len(shown - {BASE, "_other"}) == 5
    for label in shown:
        meant = {label} if label != "_other" else {name for name in names[1:] if name and name not in shown}
        counted = sum(tokens[name] for name in meant)
        assert metrics.value("perft_adapter_generation_tokens_total", adapter=label) == counted
        for reason in reasons:
            found = metrics.value("perft_adapter_requests_total", adapter=label, finish_reason=reason)
            assert found == sum(requests[name, reason] for name in meant)


def test_five_thousand_names_stay_under_the_cap() -> None:
    metrics = Metrics(max_adapters=500)
    names = [f"tenant-{number:04}" for number in range(5_000)]
    metrics.state = replace(SNAPSHOT, adapters={name: AdapterState(running=1, tier="device") for name in names})
    for name in names:
        finish(metrics, name)
        metrics.events.experts_worked(name, [1] * 1_000)
    found = metrics.samples()
    shown = {value for series in found.values() for key in series for label, value in key if label == "adapter"}
    assert len(shown) == 502, "500 names, the base and _other"
    other = ("adapter", "_other")
    assert found["perft_adapter_requests_total"][frozenset({other, ("finish_reason", "stop")})] == 4_500
    assert found["perft_adapter_requests_running"][frozenset({other})] == 4_500
    assert found["perft_adapter_resident"][frozenset({other, ("tier", "device")})] == 4_500
    of_first = found["perft_expert_tokens_total"][frozenset({("adapter", names[0]), ("expert", "_other")})]
    assert of_first == 1_000 - 64
    assert sum(found["perft_expert_tokens_total"].values()) == 5_000 * 1_000
    assert len(found["vllm:lora_requests_info"]) == 1
    assert all(len(value) <= MAX_LIST_CHARACTERS for key in found["vllm:lora_requests_info"] for _, value in key)
    assert sum(len(series) for series in found.values()) < 100_000


def test_a_made_up_name_leaves_nothing_behind() -> None:
    metrics = Metrics(is_known=lambda name: name == "poet")
    finish(metrics, "poet")

    def ask(first: int, last: int) -> None:
        for number in range(first, last):
            finish(metrics, f"nobody-{number}")
            metrics.events.first_token(f"nobody-{number}", 0.1)

    tracemalloc.start()
    ask(0, 5_000)
    before = tracemalloc.get_traced_memory()[0]
    ask(5_000, 10_000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 10_000, f"{grown} bytes for 5,000 names"
    assert "nobody" not in metrics.text()
    assert metrics.value("perft_adapter_requests_total", adapter="_other", finish_reason="stop") == 10_000


def test_a_deleted_adapter_goes_and_frees_its_place() -> None:
    metrics = Metrics(max_adapters=1)
    metrics.state = StateSnapshot({}, 8)
    finish(metrics, "first")
    finish(metrics, "second")
    assert metrics.adapters_shown() == {BASE, "_other", "first"}
    metrics.events.adapter_deleted("first")
    assert metrics.adapters_shown() == {BASE, "_other"}
    finish(metrics, "second")
    assert metrics.adapters_shown() == {BASE, "_other", "second"}
    assert metrics.value("perft_adapter_requests_total", adapter="second", finish_reason="stop") == 1
    metrics.events.adapter_deleted("second")
    finish(metrics, "first")
    assert metrics.value("perft_adapter_requests_total", adapter="first", finish_reason="stop") == 1, "a new beginning"


def test_deleting_what_holds_no_place_changes_nothing(metrics: Metrics) -> None:
    finish(metrics, "poet")
    metrics.events.adapter_deleted("nobody")
    metrics.events.adapter_deleted(BASE)
    metrics.events.adapter_deleted("_other")
    assert {BASE, "_other", "poet"} <= metrics.adapters_shown()


def experts(metrics: Metrics, adapter: str) -> dict[str, float]:
    found = metrics.samples().get("perft_expert_tokens_total", {})
    return {dict(key)["expert"]: value for key, value in found.items() if dict(key)["adapter"] == adapter}


def test_tokens_of_experts_are_added_up(metrics: Metrics) -> None:
    for worked in ([10, 0, 5], [0, 0, 1], []):
        metrics.events.experts_worked("poet", worked)
    assert experts(metrics, "poet") == {"0": 10, "1": 0, "2": 6}, "an expert that never worked is seen at 0"
    metrics.events.adapter_deleted("poet")
    assert experts(metrics, "poet") == {}


def test_what_others_experts_worked_stays_when_one_gets_a_place() -> None:
    metrics = Metrics(max_adapters=1)
    metrics.state = StateSnapshot({}, 8)
    for name in ("first", "second"):
        metrics.events.experts_worked(name, [4, 1])
    metrics.events.adapter_deleted("first")
    metrics.events.experts_worked("second", [2, 0])
    assert experts(metrics, "second") == {"0": 2, "1": 0} and experts(metrics, "_other") == {"0": 4, "1": 1}


def test_many_threads_lose_no_count_and_leave_no_deleted_series() -> None:
    deleted: set[str] = set()
    metrics = Metrics(max_adapters=4, is_known=lambda name: name not in deleted)
    metrics.state = StateSnapshot({}, 8)
    start = threading.Barrier(6)

    def ask(name: str) -> None:
        start.wait()
        for _ in range(400):
            finish(metrics, name)
            metrics.events.inter_token("gone", 0.01)

    def delete() -> None:
        start.wait()
        for _ in range(200):
            metrics.events.adapter_deleted("gone")
            metrics.text()
        deleted.add("gone")
        metrics.events.adapter_deleted("gone")

    threads = [threading.Thread(target=ask, args=(f"a{number % 2}",)) for number in range(5)]
    threads.append(threading.Thread(target=delete))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = metrics.samples()["perft_adapter_requests_total"]
    assert sum(found.values()) == 5 * 400
    assert metrics.adapters_shown() == {BASE, "_other", "a0", "a1"}


def test_state_is_read_at_every_scrape(metrics: Metrics) -> None:
    assert metrics.value("perft_adapter_requests_running", adapter="poet") == 2
    assert metrics.value("perft_adapter_requests_waiting", adapter="clerk") == 3
    resident = metrics.samples()["perft_adapter_resident"]
    assert {tuple(sorted(dict(key).values())) for key in resident} == {
        ("device", "poet"),
        ("clerk", "disk"),
        ("host", "spare"),
    }
    assert set(resident.values()) == {1}
    assert metrics.value("perft_device_rows_used") == 30 and metrics.value("perft_device_rows_total") == 100
    assert metrics.value("perft_store_bytes") == 7_000 and metrics.value("perft_moe_layers") == 2
    assert metrics.value("perft_step_load_bytes_total") == 0
    assert metrics.value("perft_store_free_bytes") == 93_000
    assert metrics.value("perft_ready") == 1
    assert metrics.value("perft_store_silent_seconds") == 0.25 and metrics.value("perft_store_names_behind") == 2
    metrics.state = StateSnapshot({"poet": AdapterState(tier="disk")}, max_lora=8, step_load_bytes=9)
    for unknown in ("perft_store_free_bytes", "perft_store_silent_seconds", "perft_store_names_behind"):
        assert metrics.value(unknown) is None, "not known, not shown"
    assert metrics.value("perft_ready") == 0
    assert metrics.value("perft_adapter_requests_running", adapter="poet") == 0
    assert metrics.value("perft_adapter_resident", adapter="poet", tier="disk") == 1
    assert metrics.value("perft_adapter_resident", adapter="poet", tier="device") is None
    assert metrics.value("perft_step_load_bytes_total") == 9


def test_idle_adapters_keep_no_place_from_those_in_use() -> None:
    metrics = Metrics(max_adapters=2)
    metrics.state = replace(SNAPSHOT, adapters={"idle-1": AdapterState(), "idle-2": AdapterState()})
    assert metrics.adapters_shown() == {BASE, "_other", "idle-1", "idle-2"}, "while everything fits, by name"
    finish(metrics, "hot-1")
    finish(metrics, "hot-2")
    assert metrics.adapters_shown() == {BASE, "_other", "hot-1", "hot-2"}
    assert metrics.value("perft_adapter_resident", adapter="_other", tier="disk") == 2


def test_the_list_that_routers_read(metrics: Metrics) -> None:
    ((key, value),) = metrics.samples()["vllm:lora_requests_info"].items()
    labels = dict(key)
    assert labels == {"max_lora": "8", "running_lora_adapters": "poet", "waiting_lora_adapters": "clerk,poet"}
    assert value > 1.7e9, "the time it was read"


def test_a_list_too_long_for_a_label_keeps_the_busiest(metrics: Metrics) -> None:
    many = {f"{number:063}": AdapterState(running=number, tier="device") for number in range(400)}
    metrics.state = replace(SNAPSHOT, adapters=many)
    ((key, _),) = metrics.samples()["vllm:lora_requests_info"].items()
    listed = dict(key)["running_lora_adapters"].split(",")
    assert len(listed) == MAX_LIST_CHARACTERS // 64 and listed == [f"{number:063}" for number in range(399, 143, -1)]


def test_what_llm_d_reads_of_where_adapters_are(metrics: Metrics) -> None:
    state = {"poet": AdapterState(tier="device", pinned=True, rank=16), "spare": AdapterState(tier="host", rank=8)}
    metrics.state = replace(SNAPSHOT, adapters={**SNAPSHOT.adapters, **state, "odd": AdapterState(tier="device")})
    loaded = {
        tuple(sorted(dict(key).items())): value for key, value in metrics.samples()["vllm:lora_adapter_loaded"].items()
    }
    assert loaded == {
        (("adapter_name", "poet"), ("level", "gpu"), ("pinned", "true"), ("rank", "16")): 1,
        (("adapter_name", "odd"), ("level", "gpu"), ("pinned", "false"), ("rank", "")): 1,
        (("adapter_name", "spare"), ("level", "cpu"), ("pinned", "false"), ("rank", "8")): 1,
    }, "neither what is on the disk alone nor what has no active version"
    assert metrics.value("vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 2
    assert metrics.value("vllm:max_gpu_lora_adapters", model_name=BASE) == 8
    metrics.state = replace(SNAPSHOT, adapters={})
    assert metrics.samples().get("vllm:lora_adapter_loaded", {}) == {}
    assert metrics.value("vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 0, "there from the start"


def test_as_many_adapters_are_listed_as_may_have_series_those_on_the_device_first() -> None:
    metrics = Metrics(max_adapters=3)
    on_host = {f"a-{number}": AdapterState(tier="host") for number in range(9)}
    metrics.state = replace(SNAPSHOT, adapters=on_host | {name: AdapterState(tier="device") for name in ("y", "z")})
    listed = {dict(key)["adapter_name"] for key in metrics.samples()["vllm:lora_adapter_loaded"]}
    assert listed == {"y", "z", "a-0"}
    assert metrics.value("vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 2


@pytest.mark.parametrize(
    ("on_device", "free_rows", "rows", "free_slots", "expected"),
    [
        (0, 1000, [100], 0, 10),
        (3, 700, [100] * 9, 0, 10),
        (3, 99, [100] * 9, 0, 3),
        (2, 500, [100, 300], 0, 4),
        (0, 1000, [], 0, 256),
        (1, 0, [1000], 3, 4),
    ],
)
def test_the_capacity_is_what_is_there_and_what_still_fits(
    on_device: int, free_rows: int, rows: list[int], free_slots: int, expected: int
) -> None:
    assert device_capacity(on_device, free_rows, rows, free_slots, 256) == expected


def vllms_own(metrics: Metrics) -> Gauge:
    """What vLLM keeps in the default registry: one series for every set of adapters that ever ran together."""
    own = Gauge(
        "vllm:lora_requests_info",
        "Running stats on lora requests.",
        ["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        registry=metrics.theirs,
    )
    for number in range(20):
        own.labels("8", "", f"poet@{number}").set(number)
    PrometheusCounter("vllm:prompt_tokens", "Number of prefill tokens.", registry=metrics.theirs).inc(11)
    return own


def test_vllms_metrics_stay_except_the_one_that_ours_replaces(metrics: Metrics) -> None:
    vllms_own(metrics)
    assert metrics.value("vllm:prompt_tokens_total") == 11
    assert len(metrics.samples()["vllm:lora_requests_info"]) == 1 and "poet@" not in metrics.text()


def test_vllms_hidden_series_do_not_pile_up(metrics: Metrics) -> None:
    own = vllms_own(metrics)
    assert len(next(iter(own.collect())).samples) == 20
    clear_vllms_adapter_lists(metrics.theirs)
    assert len(next(iter(own.collect())).samples) == 0
    own.labels("8", "", "poet@1").set(1)
    metrics.text()
    assert len(next(iter(own.collect())).samples) == 0, "a scrape forgets them too"
    clear_vllms_adapter_lists(CollectorRegistry())


def test_only_vllms_series_say_when_they_were_made(metrics: Metrics) -> None:
    vllms_own(metrics)
    made = set(re.findall(r"^(\w[\w:]*_created)", metrics.text(), re.MULTILINE))
    assert made == {"vllm:prompt_tokens_created"}


ACCEPTED_BY_PROMETHEUS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def test_names_keep_their_colon_whatever_is_accepted(metrics: Metrics) -> None:
    """In OpenMetrics prometheus-client would write vllm_lora_requests_info."""
    for headers in ({}, {"accept": ACCEPTED_BY_PROMETHEUS}):
        answer = metrics.client.get("/metrics", headers=headers)
        assert answer.headers["content-type"] == PLAIN_TEXT
        assert "\nvllm:lora_requests_info{" in answer.text and "vllm_lora" not in answer.text


def test_the_page_is_compressed_where_that_is_accepted(metrics: Metrics) -> None:
    with metrics.client.stream("GET", "/metrics", headers={"accept-encoding": "gzip"}) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert b"perft_moe_layers 2.0" in gzip.decompress(b"".join(answer.iter_raw()))


def test_single_samples_can_be_asked_for(metrics: Metrics) -> None:
    answer = metrics.client.get("/metrics", params={"name[]": ["perft_moe_layers", "perft_uploads_total"]})
    assert {sample.name for family in parse(answer.text) for sample in family.samples} == {
        "perft_moe_layers",
        "perft_uploads_total",
    }


async def listening(settings: Settings, metrics: Metrics) -> Listener:
    listener = await serve_metrics(settings, metrics.page)
    assert listener is not None
    return listener


def test_a_free_port_is_found_and_said(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        listener = await listening(Settings(metrics_bind="127.0.0.1:0"), metrics)
        url = f"http://{listener.address}/metrics"
        answer = await asyncio.to_thread(httpx.get, url)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert f"/metrics is at {url}" in capsys.readouterr().out and ":0/" not in url
        await listener.close()

    asyncio.run(test())


def test_a_bind_of_its_own(metrics: Metrics) -> None:
    settings = Settings(metrics_bind=f"127.0.0.1:{free_port()}")
    url = f"http://{settings.metrics_bind}"

    def ask(path: str) -> tuple[int, str, str]:
        asked = httpx.get(url + path, headers={"Accept": ACCEPTED_BY_PROMETHEUS})
        return asked.status_code, asked.headers["content-type"], asked.text

    async def test() -> None:
        listener = await listening(settings, metrics)
        try:
            for path in ("/metrics", "/metrics/"):
                status, kind, text = await asyncio.to_thread(ask, path)
                assert (status, kind) == (200, PLAIN_TEXT) and "perft_moe_layers 2.0" in text
            assert (await asyncio.to_thread(ask, "/metrics?name[]=perft_moe_layers"))[2].count("# TYPE") == 1
            assert (await asyncio.to_thread(ask, "/v1/models"))[0] == 404
            with pytest.raises(StartError, match=f"{settings.metrics_bind}: cannot be used"):
                await serve_metrics(settings, metrics.page)
        finally:
            await listener.close()
        await (await listening(settings, metrics)).close()

    asyncio.run(test())


def test_a_bind_of_its_own_holds_no_connection_that_asks_nothing(metrics: Metrics) -> None:
    """And no thread: the standard library's server kept one for each, for ever."""
    settings = Settings(metrics_bind=f"127.0.0.1:{free_port()}", header_timeout_s=2)
    assert settings.metrics_address is not None
    port = settings.metrics_address[1]

    def abuse() -> int:
        before = threading.active_count()
        with ExitStack() as held:
            silent = [held.enter_context(RawConnection(port)) for _ in range(100)]
            refused = sum(status_of(one.read_to_end()) == 503 for one in silent)  # all are ended by the server
            assert refused >= 100 - METRICS_CONNECTIONS // 2 and threading.active_count() <= before + 2
            endless = held.enter_context(RawConnection(port))
            endless.send(b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 300_000)
            assert status_of(endless.read_to_end()) == 431
        return httpx.get(f"http://{settings.metrics_bind}/metrics").status_code

    async def test() -> None:
        listener = await listening(settings, metrics)
        assert await asyncio.to_thread(abuse) == 200
        await listener.close()

    asyncio.run(test())
