"""Two real `perft serve` over one store: what one answered, the other keeps to; killed, one comes back to it all."""

import signal
import time
from pathlib import Path

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import BASE, BASE_NAME, TinyClient, long_prompt
from tests.synthetic import RANDOM_R, write_adapter

PROMPT = long_prompt(7, 40)
LAG_S = 1.0


def start(model: Path, tmp_path: Path, number: int) -> ServerProcess:
    return tiny_server.start(
        model, tmp_path / f"unused-{number}", "--adapter-store", f"file://{tmp_path / 'shared'}",
        "--adapter-cache", str(tmp_path / f"cache-{number}"), "--store-lag-s", str(LAG_S), "--drain-timeout-s", "1",
        "--store-grace-s", "1",
    )  # fmt: skip


def said(client: TinyClient, model: str) -> tuple[str, list[int]]:
    answer = client.complete(model, PROMPT)
    return answer.model, answer.tokens


def test_two_servers_over_one_store(tiny_model: Path, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"adapter-{seed}", BASE, seed, RANDOM_R) for seed in (1, 2)]
    servers = [start(tiny_model, tmp_path, number) for number in (1, 2)]
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

    servers[1].process.send_signal(signal.SIGKILL)
    servers[1].process.wait()
    assert one.http.delete("/v1/adapters/poet/versions/2").status_code == 202
    servers[1] = start(tiny_model, tmp_path, 2)
    two = TinyClient(servers[1].url, None)
    assert said(two, "poet") == (first.model, first.tokens)
    assert two.refusal("POST", "/v1/completions", json=TinyClient.body("poet@2", PROMPT, 4)) == (404, "model_not_found")
    assert one.http.delete("/v1/adapters/poet").status_code == 202
    for client in (two, one):
        body = TinyClient.body("poet", PROMPT, 4)
        assert client.refusal("POST", "/v1/completions", json=body) == (404, "model_not_found")
    deadline = time.monotonic() + 60
    while list((tmp_path / "shared" / "blobs").rglob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert one.upload("poet", folders[0]).json()["active"] == 3, "numbers are not given again"
    assert [server.stop() for server in servers] == [0, 0]
