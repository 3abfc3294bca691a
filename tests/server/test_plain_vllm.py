"""vLLM's own server with our package installed, and nothing of `perft serve`: it serves a PERFT adapter too.

It is started as anybody would, without a word about compilation or eager mode.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perft.hf import save
from tests import tiny
from tests.server.processes import ServerProcess, free_port, launch

CASE = ("R", "lora", {})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("olmoe", tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    adapter = tiny.attach_random(tiny.load(model), CASE, seed=1)
    save(adapter, model.parent / "adapter")
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), "--dtype", "float32"]
    arguments += ["--served-model-name", "tiny", "--skip-tokenizer-init", "--max-model-len", "128", "--port", str(port)]
    arguments += ["--gpu-memory-utilization", "0.3", "--host", "127.0.0.1"]
    arguments += ["--enable-lora", "--lora-modules", f"mine={model.parent / 'adapter'}"]
    running = launch(arguments, port, model.parent / "server.log")
    running.wait_until("/health")
    yield running
    running.stop()


def complete(server: ServerProcess, model: str, prompt: list[int]) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body | {"ignore_eos": True, "detokenize": False}).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        values: dict[str, Any] = json.load(answer)
    assert values["model"] == model
    tokens: list[int] = values["choices"][0]["token_ids"]
    return tokens


@torch.inference_mode()
def expected(model: Path, prompt: list[int], with_adapter: bool) -> list[int]:
    reference: Any = tiny.load(model)
    if with_adapter:
        tiny.attach_random(reference, CASE, seed=1)
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("name", "with_adapter"), [("tiny", False), ("mine", True)])
def test_it_answers_with_the_adapter_and_without(
    server: ServerProcess, model: Path, name: str, with_adapter: bool
) -> None:
    prompt = [5, 17, 99, 3, 42]
    assert complete(server, name, prompt) == expected(model, prompt, with_adapter)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_route_of_ours_is_there(server: ServerProcess, method: str) -> None:
    request = urllib.request.Request(f"{server.url}/v1/adapters", b"{}" if method == "POST" else None, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 404
