"""`perft serve` of two bases of one shape over one store: the adapters of the first answer on no other."""

import shutil
from pathlib import Path
from typing import Any

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import BASE, BASE_NAME, TinyClient, long_prompt
from tests.synthetic import RANDOM_R, write_adapter

SHARED: dict[str, Any] = {k: v for k, v in RANDOM_R.items() if k not in ("top_k", "renormalize")}
VARIANTS: dict[str, dict[str, Any]] = {
    "r": RANDOM_R,
    "s": SHARED | {"variant": "S", "num_experts": 1},
    "d": SHARED | {"variant": "D", "num_experts": 3},
}
PROMPT = long_prompt(7, 40)


def said_at_start(server: ServerProcess) -> list[str]:
    """The lines about adapters given at start."""
    return [line for line in server.log.read_text().splitlines() if line.startswith("--adapter ")]


def test_adapters_of_one_base_do_not_answer_on_another(tiny_model: Path, tmp_path: Path) -> None:
    store, given = tmp_path / "store", list[str]()
    for seed, (name, values) in enumerate(VARIANTS.items()):
        given += ["--adapter", f"{name}={write_adapter(tmp_path / name, BASE, seed, values)}"]
    other_model = tiny_server.build_model(tmp_path / "other", seed=1)

    server = tiny_server.start(tiny_model, store, *given)
    client = TinyClient(server.url, None)
    answers = {name: client.complete(name, PROMPT) for name in VARIANTS}
    assert {name: answer.model for name, answer in answers.items()} == {name: f"{name}@1" for name in VARIANTS}
    assert said_at_start(server) == [
        f"--adapter {name}: new content: it is version 1 now, the active one" for name in VARIANTS
    ]
    accepted = {v["digest"]: v["state"] for name in VARIANTS for v in client.adapter(name)["versions"]}
    assert len(accepted) == 3 and set(accepted.values()) == {"ready"}
    assert server.stop() == 0

    server = tiny_server.start(other_model, store, *given)
    client = TinyClient(server.url, None)
    assert client.complete(BASE_NAME, PROMPT).model == BASE_NAME
    for name in VARIANTS:
        for model in (name, f"{name}@1"):
            body = TinyClient.body(model, PROMPT, 4)
            assert client.refusal("POST", "/v1/completions", json=body) == (503, "adapter_unavailable")
        (version,) = client.adapter(name)["versions"]
        assert version["state"] == "failed" and version["resident"] == "disk" and version["digest"] in accepted
        assert "base: found one of fingerprint" in version["reason"] and "was accepted on" in version["reason"]
        refusal = client.refusal("PATCH", f"/v1/adapters/{name}", json={"active": 1})
        assert refusal == (503, "adapter_unavailable")
    assert [model["id"] for model in client.http.get("/v1/models").json()["data"]] == [BASE_NAME]
    lines = said_at_start(server)
    assert len(lines) == 3 and all(
        "nothing changed: this content is version 1 already, which cannot" in x for x in lines
    )
    assert server.stop() == 0

    server = tiny_server.start(other_model, store, "--allow-other-base")
    client = TinyClient(server.url, None)
    for name in VARIANTS:
        assert client.complete(name, PROMPT).model == f"{name}@1"
    assert server.stop() == 0

    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    server = tiny_server.start(moved, store, "--served-model-name", "moved")
    client = TinyClient(server.url, None)
    assert client.complete("moved", PROMPT).model == "moved", "another path, another name, the same base"
    for name, answer in answers.items():
        assert client.complete(name, PROMPT) == answer
        assert [version["state"] for version in client.adapter(name)["versions"]] == ["ready"]
    assert server.stop() == 0
