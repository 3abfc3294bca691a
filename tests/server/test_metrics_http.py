"""GET /metrics of the real server against what a client counted itself, from what it sent and what it got."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess, wait_until
from tests.server.tiny_server import (
    BASE_NAME,
    POOL_ADAPTERS,
    ROWS,
    Samples,
    TinyClient,
    long_prompt,
)
from tests.synthetic import RANDOM_R

LAYERS = 4
SAMPLED_EVERY = 64
NAMES = ("ode", "elegy")
LEFT = "epic"
"""The adapter whose requests are left before their end: what they generated is known only within bounds."""


@dataclass
class Count:
    """What a client counted of one adapter. gaps: from one token of a choice to the next."""

    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    gaps: int = 0

    def add(self, prompts: list[list[int]], choices: list[tuple[str, int]]) -> None:
        """A request's prompts, and the finish reason and number of tokens of all its choices."""
        reasons = [reason for reason, _ in choices][:: len(choices) // len(prompts)]
        self.ended.update(reasons)
        self.prompt_tokens += sum(map(len, prompts))
        self.generation_tokens += sum(tokens for _, tokens in choices)
        self.gaps += sum(tokens - 1 for _, tokens in choices)


class Load:
    """Requests of every kind, counted by adapter as their answers come."""

    def __init__(self, client: TinyClient) -> None:
        self.client = client
        self.counts = {name: Count() for name in (BASE_NAME, *NAMES, LEFT)}
        self.seen_before_leaving = 0
        self._lock = Lock()

    def _add(self, model: str, prompts: list[list[int]], choices: list[tuple[str, int]]) -> None:
        with self._lock:
            self.counts[model].add(prompts, choices)

    def plain(self, model: str, prompt: list[int], tokens: int, **more: Any) -> None:
        self._whole(model, [prompt], tokens, prompt=prompt, **more)

    def batch(self, model: str, prompts: list[list[int]], tokens: int) -> None:
        self._whole(model, prompts, tokens, prompt=prompts)

    def choices(self, model: str, prompt: list[int], tokens: int, streamed: bool) -> None:
        more = {"n": 2, "temperature": 1.0, "seed": 7}
        (self.streamed if streamed else self.plain)(model, prompt, tokens, **more)

    def streamed(self, model: str, prompt: list[int], tokens: int, **more: Any) -> None:
        found: dict[int, tuple[str, int]] = {}
        usage: dict[str, Any] = {}
        for event in self.client.stream(model, prompt, tokens, **more):
            for choice in event["choices"]:
                reason, count = found.get(choice["index"], ("", 0))
                count += len(choice["token_ids"] or ())
                found[choice["index"]] = (choice["finish_reason"] or reason, count)
            usage = event.get("usage") or usage
        assert usage["completion_tokens"] == sum(count for _, count in found.values())
        self._add(model, [prompt], list(found.values()))

    def chat(self, model: str, words: list[int], tokens: int) -> None:
        messages = [{"role": "user", "content": " ".join(f"t{word}" for word in words)}]
        body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        response = self.client.http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        values = response.json()
        assert values["usage"]["prompt_tokens"] == len(words)
        self._add(model, [words], [(values["choices"][0]["finish_reason"], values["usage"]["completion_tokens"])])

    def stopped(self, model: str, prompt: list[int]) -> None:
        """Stops at the third token that comes by itself."""
        tokens = self.client.complete(model, prompt, 3).tokens
        self._add(model, [prompt], [("length", 3)])
        self.plain(model, prompt, 30, stop_token_ids=[tokens[-1]])

    def left(self, model: str, prompt: list[int], after: int, tokens: int) -> None:
        """Streamed, and left after so many tokens."""
        seen = 0
        with self.client.http.stream(
            "POST", "/v1/completions", json=self.client.body(model, prompt, tokens, stream=True)
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    seen += sum(len(choice["token_ids"] or ()) for choice in json.loads(line[6:])["choices"])
                if seen >= after:
                    break
        with self._lock:
            self.seen_before_leaving += seen
        self._add(model, [prompt], [("abort", 0)])

    def refused(self, status: int, model: str, **more: Any) -> None:
        body = self.client.body(model, [3, 4, 5], 4) | more
        assert self.client.http.post("/v1/completions", json=body).status_code == status

    def _whole(self, model: str, prompts: list[list[int]], tokens: int, **more: Any) -> None:
        response = self.client.http.post("/v1/completions", json=self.client.body(model, [], tokens) | more)
        response.raise_for_status()
        values = response.json()
        found = [(choice["finish_reason"], len(choice["token_ids"])) for choice in values["choices"]]
        assert values["usage"]["completion_tokens"] == sum(count for _, count in found)
        self._add(model, prompts, found)


@pytest.fixture
def adapters(admin: TinyClient, tmp_path: Path) -> Iterator[None]:
    for number, name in enumerate((*NAMES, LEFT)):
        assert admin.upload(name, tiny_server.adapter(tmp_path / name, seed=30 + number)).status_code == 201
    yield
    admin.remove(*NAMES, LEFT)


def samples(admin: TinyClient) -> Samples:
    return Samples.of(admin.metrics())


def quiet(admin: TinyClient) -> bool:
    """Whether nothing runs or waits."""
    now = samples(admin)
    return not now.total("perft_adapter_requests_running") and not now.total("perft_adapter_requests_waiting")


@pytest.mark.usefixtures("adapters")
def test_requests_and_tokens_are_what_the_client_counted(admin: TinyClient, alice: TinyClient) -> None:
    load = Load(alice)
    before = samples(admin)
    with ThreadPoolExecutor(12) as pool:
        work = []
        for number, model in enumerate((BASE_NAME, *NAMES) * 2):
            first = 300 + 10 * number
            work += [
                pool.submit(load.plain, model, long_prompt(first, 7 + number), 20),
                pool.submit(load.streamed, model, long_prompt(first + 1, 90), 25),
                pool.submit(load.choices, model, long_prompt(first + 2, 11), 9, streamed=False),
                pool.submit(load.choices, model, long_prompt(first + 3, 12), 8, streamed=True),
                pool.submit(load.batch, model, [long_prompt(first + 4, 5), long_prompt(first + 5, 40)], 6),
                pool.submit(load.chat, model, long_prompt(first + 6, 13), 5),
                pool.submit(load.stopped, model, long_prompt(first + 7, 9)),
                pool.submit(load.plain, model, long_prompt(first + 8, 3), 1),
                pool.submit(load.refused, 400, model, max_tokens=-1),
                pool.submit(load.refused, 400, model, prompt=[3] * 400),
                pool.submit(load.refused, 404, f"{model}@999"),
                pool.submit(load.refused, 404, f"nobody-{number}"),
            ]
            work += [pool.submit(load.left, LEFT, long_prompt(first + 9, 10), 5, 300)]
        for future in work:
            future.result()
    wait_until(lambda: quiet(admin))
    counted = samples(admin) - before
    for name, count in load.counts.items():
        found = counted.of_name("perft_adapter_requests_total", adapter=name)
        ended = Counter({dict(labels)["finish_reason"]: value for labels, value in found.items() if value})
        if name == LEFT:  # one may have come to its end before its client got to leave
            assert ended.total() == count.ended.total() and set(ended) <= {"abort", "length"} and ended["abort"]
        else:
            assert ended == count.ended, name
        assert counted.total("perft_adapter_prompt_tokens_total", adapter=name) == count.prompt_tokens, name
        requests = count.ended.total()
        assert counted.total("perft_adapter_e2e_seconds_count", adapter=name) == requests, name
        assert counted.total("perft_adapter_time_to_first_token_seconds_count", adapter=name) == requests, name
        generated = counted.total("perft_adapter_generation_tokens_total", adapter=name)
        gaps = counted.total("perft_adapter_inter_token_latency_seconds_count", adapter=name)
        if name == LEFT:
            assert load.seen_before_leaving <= generated <= requests * 300 and gaps == generated - requests
        else:
            assert generated == count.generation_tokens and gaps == count.gaps, name
    named = {dict(labels)["adapter"] for labels in samples(admin).of_name("perft_adapter_requests_total")}
    assert named & {"_other", BASE_NAME, *NAMES, LEFT} == {"_other", BASE_NAME, *NAMES, LEFT}
    assert not any(name.startswith("nobody") or "@" in name for name in named)
    assert counted.total("perft_adapter_requests_total", adapter="_other") == 0


@pytest.mark.usefixtures("adapters")
def test_latencies_are_those_a_client_can_see(admin: TinyClient, alice: TinyClient) -> None:
    """The first token and the whole answer come no earlier than the server says, and every gap is inside."""
    before = samples(admin)
    alice.stream_tokens(NAMES[0], long_prompt(400), 40)
    counted = samples(admin) - before
    labels = {"adapter": NAMES[0]}
    first = counted.total("perft_adapter_time_to_first_token_seconds_sum", **labels)
    gaps = counted.total("perft_adapter_inter_token_latency_seconds_sum", **labels)
    whole = counted.total("perft_adapter_e2e_seconds_sum", **labels)
    assert 0 < first < whole and 0 < gaps < whole and first + gaps <= whole


def test_uploads_are_counted_by_their_answer(admin: TinyClient, alice: TinyClient, tmp_path: Path) -> None:
    folder = tiny_server.adapter(tmp_path / "a", seed=41)
    before = samples(admin)
    try:
        assert admin.upload("counted", folder).status_code == 201
        assert admin.upload("counted", folder).status_code == 200
        assert admin.upload("Counted", folder).status_code == 400
        assert admin.upload(BASE_NAME, folder).json()["error"]["code"] == "name_conflict"
        (folder / "adapter_config.json").write_text("{}")
        assert admin.upload("counted", folder).json()["error"]["code"] == "invalid_adapter"
        weights = b"x" * (tiny_server.MAX_ADAPTER_BYTES + 1)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        assert admin.upload("counted", folder).json()["error"]["code"] == "adapter_too_large"
        assert admin.http.post("/v1/adapters", content=b"{}").json()["error"]["code"] == "invalid_request"
        assert alice.http.post("/v1/adapters", content=b"{}").json()["error"]["code"] == "forbidden"
        found = (samples(admin) - before).of_name("perft_uploads_total")
        assert {dict(labels)["result"]: value for labels, value in found.items() if value} == {
            "created": 1, "existing": 1, "invalid_name": 1, "name_conflict": 1, "invalid_adapter": 1,
            "adapter_too_large": 1, "invalid_request": 1,
        }  # fmt: skip
    finally:
        admin.remove("counted")


def test_residency_is_what_the_adapters_say(admin: TinyClient, alice: TinyClient, tmp_path: Path) -> None:
    """More adapters than the pool holds: rows, tiers, loads and evictions add up."""
    names = [f"many-{number}" for number in range(POOL_ADAPTERS + 3)]
    wait_until(
        lambda: samples(admin).total("perft_device_rows_used") == 0 or not admin.http.get("/v1/adapters").json()["data"]
    )
    start = samples(admin)
    try:
        for number, name in enumerate(names):
            assert admin.upload(name, tiny_server.adapter(tmp_path / name, seed=50 + number)).status_code == 201
        assert admin.upload("twin", tmp_path / names[-1]).status_code == 201
        uploaded = samples(admin)
        for name in [*names, "twin", names[0], names[-1]]:
            alice.complete(name, [3, 4, 5], 4)
        wait_until(lambda: quiet(admin))
        now, objects = samples(admin), admin.http.get("/v1/adapters").json()["data"]
        self_told = {each["name"]: each["versions"][0] for each in objects}
        assert set(self_told) == {*names, "twin"}
        resident = now.of_name("perft_adapter_resident")
        assert {
            tuple(dict(labels)[key] for key in ("adapter", "tier")): value for labels, value in resident.items()
        } == {(name, version["resident"]): 1 for name, version in self_told.items()}
        on_device = {version["digest"] for version in self_told.values() if version["resident"] == "device"}
        assert len(on_device) == POOL_ADAPTERS and self_told["twin"]["resident"] == "device"
        assert now.total("perft_device_rows_used") == len(on_device) * ROWS == now.total("perft_device_rows_total")
        assert {version["rows"] for version in self_told.values()} == {ROWS}
        sizes = {version["digest"]: version["size_bytes"] for version in self_told.values()}
        assert now.total("perft_store_bytes") == sum(sizes.values()) and now.total("perft_store_free_bytes") > 0
        device = (now - start).total("perft_adapter_load_seconds_count", tier="device")
        host = (now - start).total("perft_adapter_load_seconds_count", tier="host")
        evicted = (now - start).total("perft_adapter_evictions_total", tier="device")
        assert evicted >= 3 and device - evicted == len(on_device)
        assert host == len(names) == (uploaded - start).total("perft_adapter_load_seconds_count", tier="host")
        assert (now - start).total("perft_adapter_evictions_total", tier="host") == 0
        assert (now - start).total("perft_adapter_loads_total", result="ok") == device + host
        assert (now - start).total("perft_adapter_loads_total", result="failed") == 0
        assert now.total("perft_step_load_bytes_total") == 0 and now.total("perft_moe_layers") == LAYERS
        assert routers_view(now)["running_lora_adapters"] == {
            name for name, version in self_told.items() if version["resident"] == "device"
        }
    finally:
        admin.remove(*names, "twin")
    after = samples(admin)
    assert after.total("perft_device_rows_used") == after.total("perft_store_bytes") == 0
    gone = [
        labels
        for family in ("perft_adapter_resident", "perft_adapter_requests_total")
        for labels in after.of_name(family)
    ]
    assert not {dict(labels)["adapter"] for labels in gone} & {*names, "twin"}


def routers_view(now: Samples) -> dict[str, set[str]]:
    """The lists of vllm:lora_requests_info, of which there is one."""
    (labels,) = now.of_name("vllm:lora_requests_info")
    return {name: set(filter(None, value.split(","))) for name, value in labels if name.endswith("adapters")}


@contextmanager
def one_after_the_other(client: TinyClient, models: Sequence[str]) -> Iterator[None]:
    """As long as this lasts, one request at a time runs on each of `models`, with hardly a pause between two."""
    is_over = Event()

    def ask(model: str) -> None:
        while not is_over.is_set():
            client.complete(model, [3, 4, 5], 300)

    with ThreadPoolExecutor(len(models)) as pool:
        asking = [pool.submit(ask, model) for model in models]
        try:
            yield
        finally:
            is_over.set()
    for each in asking:
        each.result()


@pytest.mark.usefixtures("adapters")
def test_what_runs_is_shown_while_it_runs(admin: TinyClient, alice: TinyClient) -> None:
    pages: list[Samples] = []

    def both_are_shown() -> bool:
        pages.append(samples(admin))
        return [pages[-1].total("perft_adapter_requests_running", adapter=name) for name in models] == [1, 1]

    models = (NAMES[0], BASE_NAME)
    with one_after_the_other(alice, models):
        wait_until(both_are_shown)
        wait_until(lambda: admin.adapter(NAMES[0])["versions"][0]["requests_running"] == 1)
    for page in pages:
        assert all(page.total("perft_adapter_requests_running", adapter=name) <= 1 for name in models)
        assert page.total("perft_adapter_requests_running", adapter=NAMES[1]) == 0
    view = routers_view(pages[-1])
    assert NAMES[0] in view["running_lora_adapters"] and not any("@" in name for name in view["running_lora_adapters"])
    wait_until(lambda: quiet(admin))
    assert admin.adapter(NAMES[0])["versions"][0]["requests_running"] == 0


@pytest.mark.usefixtures("adapters")
def test_experts_tokens_add_up(admin: TinyClient, alice: TinyClient) -> None:
    """Alone on the server, one token a step: every 64th step counts K experts in each of its layers."""
    steps, top_k = 5 * SAMPLED_EVERY, RANDOM_R["top_k"]

    def tokens() -> dict[str, float]:
        found = samples(admin).of_name("perft_expert_tokens_total", adapter=NAMES[0])
        return {dict(labels)["expert"]: value for labels, value in found.items()}

    assert not tokens()
    alice.complete(NAMES[0], [3], steps)
    fewest = (steps // SAMPLED_EVERY) * top_k * LAYERS
    wait_until(lambda: sum(tokens().values()) >= fewest)
    assert set(tokens()) == {str(expert) for expert in range(RANDOM_R["num_experts"])}
    total = sum(tokens().values())
    assert total % (top_k * LAYERS) == 0 and total // (top_k * LAYERS) - steps // SAMPLED_EVERY in (0, 1)
    assert max(tokens().values()) <= total / top_k, "an expert works on a token at most once in a layer"


def test_the_page_is_the_admins(server: ServerProcess, admin: TinyClient, alice: TinyClient) -> None:
    nobody = TinyClient(server.url, key=None)
    assert nobody.refusal("GET", "/metrics") == (401, "invalid_api_key")
    assert alice.refusal("GET", "/metrics") == (403, "forbidden")
    assert nobody.refusal("GET", "/metrics/") == (401, "invalid_api_key")
    page = admin.metrics()
    assert "vllm:request_success_total" in page and "vllm:prefix_cache_hits_total" in page
    nobody.close()


def test_every_answer_is_counted_by_its_status(server: ServerProcess, admin: TinyClient, alice: TinyClient) -> None:
    """What our middleware refuses too, which never reaches vLLM's; by route, so that no client makes a series."""
    nobody = TinyClient(server.url, key=None)
    before = samples(admin)
    alice.complete(BASE_NAME, long_prompt(430, 20), 2)
    assert nobody.refusal("POST", "/v1/completions", json={})[0] == 401
    assert alice.refusal("POST", "/v1/completions", json=alice.body("nix", [5], 1))[0] == 404
    assert admin.refusal("DELETE", "/v1/adapters/nix/versions/3")[0] == 404
    assert admin.refusal("GET", "/v1/adapters/nix")[0] == 404
    assert admin.refusal("GET", "/made/up")[0] == 404
    assert admin.http.get("/health").status_code == 200
    nobody.close()
    counted = (samples(admin) - before).of_name("http_requests_total")
    found = {(dict(labels)["handler"], dict(labels)["status"]): value for labels, value in counted.items() if value}
    assert found == {
        ("/v1/completions", "2xx"): 1, ("/v1/completions", "4xx"): 2, ("none", "4xx"): 1,
        ("/v1/adapters/{name}", "4xx"): 1, ("/v1/adapters/{name}/versions/{version}", "4xx"): 1,
    }  # fmt: skip


def test_what_dashboard_alerts_and_documentation_name_is_on_the_page(admin: TinyClient) -> None:
    """Of a server whose store is a folder of its own."""
    root = Path(__file__).parents[2]
    named: set[str] = set()
    for file in ("deploy/grafana/dashboards/perft.json", "deploy/prometheus/alerts.yml", "docs/metrics.md"):
        text = (root / file).read_text(encoding="utf-8")
        named |= set(re.findall(r"\b(?:perft_|vllm:|http_requests_|process_)[a-z0-9_:]+", text))
    assert len(named) > 40
    said = set(re.findall(r"^# TYPE (\S+)", admin.metrics(), re.MULTILINE))
    said |= {name + suffix for name in said for suffix in ("_bucket", "_sum", "_count")}
    assert named - said == {"perft_store_silent_seconds", "perft_store_names_behind"}


def test_vllms_counters_agree_with_ours(admin: TinyClient, alice: TinyClient) -> None:
    before = samples(admin)
    alice.complete(BASE_NAME, long_prompt(420, 50), 7)
    alice.stream_tokens(BASE_NAME, long_prompt(421, 60), 8)
    counted = samples(admin) - before
    assert counted.total("vllm:prompt_tokens_total") == counted.total("perft_adapter_prompt_tokens_total") == 110
    assert counted.total("vllm:generation_tokens_total") == counted.total("perft_adapter_generation_tokens_total") == 15
    assert counted.total("vllm:request_success_total") == counted.total("perft_adapter_requests_total") == 2
