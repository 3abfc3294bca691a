"""Ray Serve, really: two replicas over one store, HAProxy in front, and what clients may rely on."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.serve.request_router import RequestRouter

from integration import ray_cluster
from integration.ray_cluster import Cluster, config
from server.ray_serve.router import AdapterRouter, report_of, routing_stats
from server.routing.choice import ReplicaReport
from tests.server import tiny_server
from tests.server.processes import free_port, wait_until
from tests.server.tiny_server import BASE, BASE_NAME, KEYS, Samples, TinyClient, long_prompt
from tests.synthetic import RANDOM_R, write_adapter

TOKENS = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster.started(model, tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / str(seed), BASE, seed, RANDOM_R) for seed in (1, 2)]


def streamed(client: TinyClient, model: str, prompt: list[int]) -> tuple[set[str], list[int]]:
    """Every model that the events of a stream name, and its tokens."""
    models, tokens = set[str](), list[int]()
    for event in client.stream(model, prompt, TOKENS):
        assert "error" not in event, event
        models.add(event["model"])
        tokens += [token for choice in event["choices"] for token in choice["token_ids"] or ()]
    return models, tokens


def test_what_one_replica_answered_every_replica_keeps_to(cluster: Cluster, folders: list[Path]) -> None:
    """Uploads, activations and a delete, with streams under way on both: each stream stays what it began as."""
    one, two = clients = [TinyClient(url) for url in sorted(cluster.replicas())]
    prompt = long_prompt(3, 40)
    assert one.upload("poet", folders[0]).status_code == 201
    expected = {"poet@1": two.complete("poet", prompt, TOKENS).tokens}
    assert two.upload("poet", folders[1]).status_code == 201
    expected["poet@2"] = one.complete("poet", prompt, TOKENS).tokens
    assert expected["poet@1"] != expected["poet@2"]
    with ThreadPoolExecutor(8) as threads:
        active = "poet@2"
        for turn, number in enumerate((1, 2, 1, 2)):
            running = [threads.submit(streamed, client, "poet", prompt) for client in clients for _ in range(3)]
            changed = clients[turn % 2].http.patch("/v1/adapters/poet", json={"active": number})
            assert changed.status_code == 200
            for client in (*clients, TinyClient(cluster.front)):
                answer = client.complete("poet", prompt, TOKENS)
                assert (answer.model, answer.tokens) == (f"poet@{number}", expected[f"poet@{number}"])
            for models, tokens in (each.result() for each in running):
                (began_as,) = models
                assert began_as in (active, f"poet@{number}") and tokens == expected[began_as]
            active = f"poet@{number}"
        running = [threads.submit(streamed, client, "poet", prompt) for client in clients for _ in range(3)]
        wait_until(lambda: sum(version["requests_running"] for version in one.adapter("poet")["versions"]) > 0)
        assert one.http.delete("/v1/adapters/poet").status_code == 202
        body = TinyClient.body("poet", prompt, 4)
        for client in (*clients, TinyClient(cluster.front)):
            assert client.refusal("POST", "/v1/completions", json=body) == (404, "model_not_found")
        finished = Counter(_outcome(each.result) for each in running)
        assert set(finished) <= {"whole", "not found"} and finished["whole"] > 0, "what ran may finish"


def _outcome(result: Any) -> str:
    try:
        _, tokens = result()
    except httpx.HTTPStatusError as error:
        return "not found" if error.response.status_code == 404 else repr(error)
    return "whole" if len(tokens) == TOKENS else "cut"


def test_the_front_passes_on_keys_errors_and_large_uploads(cluster: Cluster, folders: list[Path]) -> None:
    client, stranger = TinyClient(cluster.front), TinyClient(cluster.front, None)
    assert stranger.refusal("DELETE", "/v1/adapters/x") == (401, "invalid_api_key")
    assert client.refusal("GET", "/v1/nothing") == (404, "not_found")
    named = client.http.get("/v1/models", headers={"X-Request-Id": "mine"})
    assert named.headers.get_list("x-request-id") == ["mine"]
    assert client.refusal("POST", "/v1/completions", content=b"{") == (400, "invalid_request")
    large = {"name": "large", "activate": "true"}
    files = {"config": b"{}", "weights": b"x" * 20_000_000}  # more than HAProxy shows the router
    assert client.http.post("/v1/adapters", data=large, files=files).status_code == 400
    assert slowly_uploaded(client, "reader", folders[0]) == 201
    assert {item["id"] for item in client.http.get("/v1/models").json()["data"]} >= {"reader", BASE_NAME}
    client.remove("reader")


def slowly_uploaded(client: TinyClient, name: str, folder: Path) -> int:
    """The status of an upload whose body comes in two parts, longer apart than Ray's HAProxy would wait by default."""
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    request = client.http.build_request("POST", "/v1/adapters", data={"name": name}, files=files)
    whole = request.read()

    def parts() -> Iterator[bytes]:
        yield whole[: len(whole) // 2]
        time.sleep(8)
        yield whole[len(whole) // 2 :]

    headers = {"content-type": request.headers["content-type"]}
    return client.http.post("/v1/adapters", content=parts(), headers=headers).status_code


def test_each_replica_has_a_cache_and_a_page_of_metrics_of_its_own(cluster: Cluster, folders: list[Path]) -> None:
    client = TinyClient(cluster.front)
    assert client.upload("counted", folders[0]).status_code == 201
    for _ in range(40):
        client.complete("counted", long_prompt(5, 8), 2)
    pages = [httpx.get(url).text for url in metrics_urls(cluster)]
    counted = [Samples.of(page).total("perft_adapter_requests_total", adapter="counted") for page in pages]
    assert len(pages) == 2 and sum(counted) == 40, counted
    client.remove("counted")


def metrics_urls(cluster: Cluster) -> list[str]:
    """Where the replicas' own pages are: the ports that they took by themselves."""
    listening = [
        f"http://127.0.0.1:{connection.laddr.port}/metrics"
        for process in cluster.processes()
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN" and connection.laddr.ip == "127.0.0.1"
    ]
    return [url for url in listening if _has_metrics(url)]


def _has_metrics(url: str) -> bool:
    try:
        return "perft_moe_layers" in httpx.get(url, timeout=5).text
    except httpx.HTTPError:
        return False


def test_a_killed_replica_fails_what_it_held_and_comes_back_to_it_all(cluster: Cluster, folders: list[Path]) -> None:
    client = TinyClient(cluster.front)
    assert client.upload("survivor", folders[0]).status_code == 201
    prompt = long_prompt(9, 20)
    expected = client.complete("survivor", prompt, TOKENS).tokens
    victim = next(iter(cluster.replicas().values()))
    outcomes = asyncio.run(asked_around_a_kill(cluster, prompt, victim.pid))
    assert outcomes["wrong"] == 0 and outcomes["after: failed"] == 0, outcomes
    assert outcomes["after: right"] == 50 and outcomes["before: right"] > 0 and sum(outcomes.values()) == 150, outcomes
    wait_until(lambda: len(cluster.replicas()) == 2 and victim.pid not in {p.pid for p in cluster.processes()})
    for url in cluster.replicas():
        each = TinyClient(url)
        wait_until(lambda each=each: each.http.get("/ready").status_code == 200)  # type: ignore[misc]
        assert each.complete("survivor", prompt, TOKENS).tokens == expected
    client.remove("survivor")


async def asked_around_a_kill(cluster: Cluster, prompt: list[int], victim: int) -> Counter[str]:
    """100 requests under way, one replica killed, 50 more: what became of them."""

    outcomes: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=200)
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}
    async with httpx.AsyncClient(base_url=cluster.front, headers=headers, timeout=300, limits=limits) as client:

        async def ask(when: str) -> None:
            body = TinyClient.body("survivor", prompt, TOKENS)
            try:
                response = await client.post("/v1/completions", json=body)
            except httpx.HTTPError:
                outcomes[f"{when}: failed"] += 1
                return
            if response.status_code != 200:
                outcomes[f"{when}: failed"] += 1
            elif len(response.json()["choices"][0]["token_ids"]) != TOKENS:
                outcomes["wrong"] += 1
            else:
                outcomes[f"{when}: right"] += 1

        before = [asyncio.create_task(ask("before")) for _ in range(100)]
        await asyncio.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        await asyncio.sleep(0.5)
        after = [asyncio.create_task(ask("after")) for _ in range(50)]
        await asyncio.gather(*before, *after)
    return outcomes


def test_what_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    """Before Ray starts where that can be known, and by the first replica that fails where not."""
    port = free_port()
    assert "expected an address that replicas share" in ray_cluster.refusal(
        tmp_path, config(model, tmp_path, port, f"--adapter-store={tmp_path}")
    )
    assert "found no admin key" in ray_cluster.refusal(tmp_path, config(model, tmp_path, port), lacks="PERFT_ADMIN_KEY")
    secret = ray_cluster.refusal(tmp_path, config(model, tmp_path, port, "--admin-key=secret-0123456789"))
    assert "expected no secret" in secret and "secret-0123456789" not in secret
    began = time.monotonic()
    said = ray_cluster.refusal(tmp_path, config(model, tmp_path, port, "--max-model-len=999999"))
    assert "a replica did not start" in said and "max_model_len" in said and time.monotonic() - began < 300


def test_the_router_is_rays_and_sees_what_replicas_report() -> None:
    report = ReplicaReport(1, 0, True, 3, "127.0.0.1:1")
    assert report_of(routing_stats(report)) == report and report_of({}) is None
    replicas = [
        SimpleNamespace(replica_id=f"r{rank}", routing_stats=routing_stats(ReplicaReport(1, rank, rank != 1, 0)))
        for rank in range(3)
    ]
    router = AdapterRouter.__new__(AdapterRouter)
    assert isinstance(router, RequestRouter)
    router.initialize_state(base_names=[BASE_NAME])

    async def chosen(*args: Any) -> str:
        ((replica,),) = await router.choose_replicas(replicas, SimpleNamespace(args=args))  # type: ignore[arg-type]
        return str(replica.replica_id)

    async def test() -> None:
        assert await router.choose_replicas([], None) == []
        poets = {await chosen(SimpleNamespace(model=f"poet@{number}", prompt="x")) for number in range(4)}
        assert len(poets) <= 2 and "r1" not in poets
        assert {await chosen() for _ in range(20)} == {"r0", "r2"}, "a body that says nothing"

    asyncio.run(test())
