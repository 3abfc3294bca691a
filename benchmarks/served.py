"""Shared by the benchmarks over HTTP: a server of the demo base, adapters like the demo's, streams, percentiles."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from perft.base_model import BaseShape, base_of_config
from perft.config import AdapterConfig
from perft.operator.tables import adapter_rows
from server.demo.__main__ import ENVIRONMENT, base_arguments
from server.demo.base.build import build, default_folder
from tests.server.processes import ServerProcess, free_port, launch
from tests.synthetic import RANDOM_R, write_adapter

SHAPE = RANDOM_R | {"bottleneck": 16}
"""Four times as large as the adapters of the demo."""


def demo_base() -> Path:
    """The demo base's folder; built if it does not exist."""
    return build(default_folder())


def shape_of(base: Path) -> BaseShape:
    from transformers import AutoConfig

    shape = base_of_config(AutoConfig.from_pretrained(base), torch.float32)
    assert shape is not None
    return shape


def rows_of(shape: BaseShape) -> int:
    """Rows that one adapter of SHAPE takes."""
    return adapter_rows(AdapterConfig.model_validate(SHAPE), shape.moe_layers)


def adapters(folder: Path, shape: BaseShape, count: int) -> list[Path]:
    """`count` random adapters, all different."""
    return [write_adapter(folder / str(seed), shape, seed, SHAPE) for seed in range(count)]


@contextmanager
def serving(base: Path, folder: Path, pool_adapters: int) -> Iterator[ServerProcess]:
    """`perft serve` as the demo runs it, without keys, with a store in `folder` and a pool for `pool_adapters`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder.mkdir()
    port, rows = free_port(), pool_adapters * rows_of(shape_of(base))
    arguments = ["-m", "server.cli", *base_arguments(base, port), "--adapter-store", str(folder / "store")]
    running = launch([*arguments, "--pool-rows", str(rows)], port, folder / "server.log")
    try:
        running.wait_until("/ready")
        yield running
    finally:
        running.stop()


class Client:
    """An HTTP client of one server. Safe from any thread."""

    def __init__(self, server: ServerProcess) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=300)

    def upload(self, name: str, folder: Path) -> None:
        """Upload and activate."""
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        self.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()

    def stream(self, model: str, prompt: Sequence[int], tokens: int) -> Iterator[float]:
        """When each token of a greedy stream arrived (`time.perf_counter` seconds)."""
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(response.read().decode())
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(line)
                    yield time.perf_counter()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def calm() -> str:
    """How busy the machine is before the start: anything else that runs distorts every number."""
    return f"load before the start: {os.getloadavg()[0]:.2f}"


def write(output: Path | None, question: str, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """Print the result as JSON, and write it to `output`, or to benchmarks/results named by question and date."""
    text = json.dumps({"machine": facts, **results}, indent=1)
    print(text, flush=True)
    folder = Path(__file__).parent / "results"
    (output or folder / f"{question}_cpu_{facts['date']}.json").write_text(text + "\n")
