"""`perft serve` itself with real vLLM on a tiny random Mixtral: the server of the tests of adapters over HTTP."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from secrets import token_hex
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.operator.tables import pool_rows
from server.engine.cpu import IN_ENGINE
from tests import tiny
from tests.server.processes import LIMIT_S, ServerProcess, launch, wait_until
from tests.synthetic import RANDOM_R, write_adapter

BASE_NAME = "tiny"
KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789", "admin": "admin-key-0123456789"}
BASE = BaseShape(64, tiny.LAYERS, tuple(range(tiny.LAYERS)), num_experts=4, top_k=2, dtype=torch.float32)
ROWS = pool_rows(tiny.LAYERS * (4 + 2 * 4 * 16))
"""Rows that one adapter of `synthetic.RANDOM_R` takes."""
POOL_ADAPTERS = 8
"""How many of them the server's pool holds."""
MAX_ADAPTER_BYTES = 16 * 1024**2
BLOCK = 32
"""Tokens of one block of the prefix cache."""
SPECIAL_WORDS = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def build_model(folder: Path, seed: int = 0) -> Path:
    """A tiny Mixtral with a tokenizer of the words t0 ... t127."""
    tiny.build("mixtral", folder, seed)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny.VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: AddedToken(word, single_word=True) for name, word in SPECIAL_WORDS.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def serve_arguments(model: Path, store: Path, port: int, *more: str) -> list[str]:
    """The `perft serve` command of the tests, without keys."""
    return [
        "-m", "server.cli", "serve", str(model), "--served-model-name", BASE_NAME, "--dtype", "float32",
        "--max-model-len", "384", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.3", "--block-size", str(BLOCK),
        "--port", str(port), "--adapter-store", str(store), "--pool-rows", str(POOL_ADAPTERS * ROWS),
        "--distributed-executor-backend", IN_ENGINE, "--enable-prompt-tokens-details",
        "--max-adapter-bytes", str(MAX_ADAPTER_BYTES), *more,
    ]  # fmt: skip


KEY_ARGUMENTS = [
    "--api-key", f"alice={KEYS['alice']}", "--api-key", f"bob={KEYS['bob']}", "--admin-key", KEYS["admin"],
]  # fmt: skip


def start(model: Path, store: Path, *more: str) -> ServerProcess:
    """Start a server and wait until it is ready."""
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    os.environ.update(environment)
    running = launch(serve_arguments(model, store, 0, *more), 0, store.parent / f"server-{token_hex(4)}.log")
    running.wait_until("/ready")
    return running


@dataclass
class Answer:
    """A finished completion: its tokens, finish reason, the model that answered, and the usage."""

    tokens: list[int]
    finish_reason: str | None
    model: str
    usage: dict[str, Any]


class TinyClient:
    """HTTP to a tiny server as one key. `http` is for what has no method here."""

    def __init__(self, url: str, key: str | None = KEYS["admin"]) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Idle connections go long before the server closes them, which would reset a request.
        self.http = httpx.Client(
            base_url=url, headers=headers, timeout=LIMIT_S, limits=httpx.Limits(keepalive_expiry=5)
        )

    def complete(self, model: str, prompt: Sequence[int], tokens: int = 16, **more: Any) -> Answer:
        """A greedy completion at once. Raises httpx.HTTPStatusError for a refusal."""
        response = self.http.post("/v1/completions", json=self.body(model, prompt, tokens, **more))
        response.raise_for_status()
        values = response.json()
        (choice,) = values["choices"]
        return Answer(choice["token_ids"], choice["finish_reason"], values["model"], values["usage"])

    def stream(self, model: str, prompt: Sequence[int], tokens: int = 16, **more: Any) -> Iterator[dict[str, Any]]:
        """The events of a greedy streamed completion, as they come; an error event is yielded like the others."""
        body = self.body(model, prompt, tokens, **more) | {"stream": True, "stream_options": {"include_usage": True}}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def stream_tokens(self, model: str, prompt: Sequence[int], tokens: int = 16, **more: Any) -> list[int]:
        """All tokens of a streamed completion. Raises AssertionError if it ended with an error."""
        found: list[int] = []
        for event in self.stream(model, prompt, tokens, **more):
            assert "error" not in event, event
            found += [token for choice in event["choices"] for token in choice["token_ids"] or ()]
        return found

    @staticmethod
    def body(model: str, prompt: Sequence[int], tokens: int, **more: Any) -> dict[str, Any]:
        fixed = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": model, "prompt": list(prompt), "max_tokens": tokens, **fixed, **more}

    def upload(self, name: str, folder: Path, activate: bool = True) -> httpx.Response:
        """POST /v1/adapters with the two files of `folder`."""
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        data = {"name": name, "activate": "true" if activate else "false"}
        return self.http.post("/v1/adapters", data=data, files=files)

    def refusal(self, method: str, path: str, **options: Any) -> tuple[int, str]:
        """Status and error code of a request that must be refused, with OpenAI's error object."""
        response = self.http.request(method, path, **options)
        assert response.status_code >= 400, response.text
        error = response.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"} and error["message"], error
        return response.status_code, error["code"]

    def adapter(self, name: str) -> dict[str, Any]:
        """GET /v1/adapters/{name}."""
        return self._object(self.http.get(f"/v1/adapters/{name}"))

    def change(self, name: str, **values: Any) -> dict[str, Any]:
        """PATCH /v1/adapters/{name}."""
        return self._object(self.http.patch(f"/v1/adapters/{name}", json=values))

    def remove(self, *names: str) -> None:
        """Delete adapters and wait until they are gone; one that is not there is no error."""
        for name in names:
            self.http.delete(f"/v1/adapters/{name}")
        for name in names:
            wait_until(lambda name=name: self.http.get(f"/v1/adapters/{name}").status_code == 404)  # type: ignore[misc]

    @staticmethod
    def _object(response: httpx.Response) -> dict[str, Any]:
        response.raise_for_status()
        values: dict[str, Any] = response.json()
        return values

    def metrics(self) -> str:
        response = self.http.get("/metrics")
        response.raise_for_status()
        return response.text

    def close(self) -> None:
        self.http.close()


class Samples:
    """What one GET /metrics says; subtract an earlier one to see what happened between."""

    def __init__(self, values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
        self.values = values

    @classmethod
    def of(cls, page: str) -> "Samples":
        families = text_string_to_metric_families(page)
        return cls({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})

    def __sub__(self, earlier: "Samples") -> "Samples":
        return Samples({key: value - earlier.values.get(key, 0.0) for key, value in self.values.items()})

    def of_name(self, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
        """Every sample of `name` that has `labels`, by all of its labels."""
        return {all_: value for (found, all_), value in self.values.items() if found == name and labels.items() <= all_}

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of `name` that have `labels`."""
        return sum(self.of_name(name, **labels).values())


def long_prompt(seed: int, length: int = 200) -> list[int]:
    """A prompt of several cache blocks that no other seed shares."""
    random = Random(seed)
    return [random.randrange(3, tiny.VOCABULARY) for _ in range(length)]


def adapter(folder: Path, seed: int, **changes: Any) -> Path:
    """A random adapter of the tiny base whose effect is strong: other seeds give other tokens."""
    import safetensors.torch

    write_adapter(folder, BASE, seed, RANDOM_R | changes)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n: t * (10.0 if n.endswith("up_proj") else 1.0) for n, t in tensors.items()}, file)
    return folder


def enormous_adapter(folder: Path) -> Path:
    """An adapter that the format allows (every value is finite, the scale times it too) and whose output is not."""
    from safetensors.torch import save_file

    values = {"base_model_name_or_path": "x", "variant": "S", "expert_type": "lora", "bottleneck": 1, "num_experts": 1}
    config = AdapterConfig.model_validate(values | {"alpha": 65536.0})
    shapes = config.tensor_shapes(config.layer_indices(BASE.moe_layers), BASE.hidden_size)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config.file_json())
    save_file({n: torch.full(s, 1e30) for n, s in shapes.items()}, folder / "adapter_model.safetensors")
    return folder
