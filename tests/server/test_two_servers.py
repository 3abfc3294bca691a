"""Two real `perft serve` over one bucket: what one answered, the other keeps to; cut off or killed, it comes back."""

import signal
import time
from pathlib import Path

import pytest

from adapters.store.log.bucket import Bucket
from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import BASE, BASE_NAME, TinyClient, long_prompt
from tests.store.wires import S3_ENVIRONMENT, Wire, s3_behind_wires
from tests.synthetic import RANDOM_R, write_adapter

PROMPT = long_prompt(7, 40)
LAG_S = 1.0


def start(model: Path, tmp_path: Path, number: int, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT": wire.address}).items():
        monkeypatch.setenv(name, value)
    return tiny_server.start(
        model, tmp_path / f"unused-{number}", "--adapter-store", "s3://adapters/two-servers",
        "--adapter-cache", str(tmp_path / f"cache-{number}"), "--store-lag-s", str(LAG_S), "--drain-timeout-s", "1",
        "--store-grace-s", "1",
    )  # fmt: skip


def said(client: TinyClient, model: str) -> tuple[str, list[int]]:
    answer = client.complete(model, PROMPT)
    return answer.model, answer.tokens


def test_two_servers_over_one_store(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_behind_wires(2) as s3:
        check_two_servers(tiny_model, tmp_path, s3.wires, monkeypatch)


def check_two_servers(tiny_model: Path, tmp_path: Path, wires: list[Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_adapter(tmp_path / f"adapter-{seed}", BASE, seed, RANDOM_R) for seed in (1, 2)]
    servers = [start(tiny_model, tmp_path, number, wires[number], monkeypatch) for number in (0, 1)]
    one, two = (TinyClient(server.url, None) for server in servers)
    base = two.complete(BASE_NAME, PROMPT).tokens

    assert one.upload("poet", folders[0]).status_code == 201
    first = two.complete("poet", PROMPT)
    assert first.model == "poet@1" and first.tokens != base
    assert two.upload("poet", folders[1]).status_code == 201
    second = one.complete("poet", PROMPT)
    assert second.model == "poet@2" and second.tokens not in (base, first.tokens)
    for number, expected in ((1, first), (2, second), (1, first)):
        assert one.http.patch("/v1/adapters/poet", json={"active": number}).status_code == 200
        for client in (two, one):
            assert said(client, "poet") == (expected.model, expected.tokens)

    with wires[1].cut():
        assert one.http.patch("/v1/adapters/poet", json={"active": 2}).status_code == 200
        body = TinyClient.body("poet", PROMPT, 4)
        assert two.refusal("POST", "/v1/completions", json=body) == (503, "store_unavailable")
        assert two.complete(BASE_NAME, PROMPT).tokens == base
        assert two.refusal("GET", "/ready") == (503, "store_unavailable")
    servers[1].wait_until("/ready")
    assert said(two, "poet") == (second.model, second.tokens)
    assert one.http.patch("/v1/adapters/poet", json={"active": 1}).status_code == 200

    servers[1].process.send_signal(signal.SIGKILL)
    servers[1].process.wait()
    assert one.http.delete("/v1/adapters/poet/versions/2").status_code == 202
    servers[1] = start(tiny_model, tmp_path, 1, wires[1], monkeypatch)
    two = TinyClient(servers[1].url, None)
    assert said(two, "poet") == (first.model, first.tokens)
    assert two.refusal("POST", "/v1/completions", json=TinyClient.body("poet@2", PROMPT, 4)) == (404, "model_not_found")
    assert one.http.delete("/v1/adapters/poet").status_code == 202
    for client in (two, one):
        body = TinyClient.body("poet", PROMPT, 4)
        assert client.refusal("POST", "/v1/completions", json=body) == (404, "model_not_found")
    deadline = time.monotonic() + 60
    while list(Bucket("s3://adapters/two-servers").list("blobs/")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert one.upload("poet", folders[0]).json()["active"] == 3, "numbers are not given again"
    assert [server.stop() for server in servers] == [0, 0]
