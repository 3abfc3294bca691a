"""Owns how long things take on a replica: measured on the demo base, or assumed for a GPU where that is not measured.

Times are seconds. A request that starts as the r-th running one takes prefill + tokens * (step + r * step_per_request).
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.format.folder import read_folder
from adapters.store.log.shared_folder import SharedFolder
from adapters.store.log.store import LogStore
from benchmarks.common.report import newest
from benchmarks.common.workload import routed
from perft.base_model import BaseShape
from tests.synthetic import write_adapter

DEMO = BaseShape(
    hidden_size=576, num_layers=30, moe_layers=tuple(range(30)), num_experts=4, top_k=2, dtype=torch.float32
)
"""The shape of the demo base."""
MB = 1e6
SEATS = 32
NETWORK_S, NETWORK_BYTES_PER_S = 0.05, 250 * MB
"""Assumed of the store that GPU replicas share, on top of what a fetch from a folder takes here."""


@dataclass(frozen=True)
class Machine:
    """One replica. seats: requests that run at once. fetch_s: store to disk. read_s: disk to host. place_s: host to
    device. prompt_tokens, answer_tokens: the means of what is asked."""

    seats: int
    step_s: float
    step_per_request_s: float
    prefill_s: float
    prefill_per_token_s: float
    fetch_s: float
    read_s: float
    place_s: float
    prompt_tokens: int
    answer_tokens: int

    def step(self, running: int) -> float:
        """Seconds of a decode step of `running` requests."""
        return self.step_s + running * self.step_per_request_s

    def prefill(self, tokens: float) -> float:
        return self.prefill_s + tokens * self.prefill_per_token_s

    def rate(self, load: float) -> float:
        """Requests per second that keep `load` of the seats busy."""
        running = load * self.seats
        return running / (self.prefill(self.prompt_tokens) + self.answer_tokens * self.step(round(running)))


def median_of(question: str, *path: str) -> float:
    """The median of raw numbers in the newest result of a question. Raises RuntimeError if there is none."""
    found: Any = newest(question)
    if found is None:
        raise RuntimeError(f"found no result of {question}, expected one: python -m benchmarks.one_process.{question}")
    found = found["raw"]
    for key in path:
        found = found[key]
    return float(statistics.median(found))


def decode_step(requests: int) -> float:
    """The median decode step of the demo base with adapters on `requests` requests."""
    found = newest("adapters")
    if found is None:
        raise RuntimeError("found no result of adapters, expected one: python -m benchmarks.one_process.adapters")
    segments = found["raw"]["decode"][f"{requests} request" + ("s" if requests > 1 else "")]
    name = "1 adapter" if requests == 1 else "8 adapters"
    return float(statistics.median(step for segment in segments[name] for step in segment["step_ms"])) / 1e3


def demo(fetch_s: float) -> Machine:
    """The demo base on two cores, adapters of D_B 16 (9.1 MB): every time is measured."""
    one, many = decode_step(1), decode_step(SEATS)
    slope = (many - one) / (SEATS - 1)
    short, long = (median_of("growth", "prompts_s", tokens, "1 adapter") for tokens in ("32", "512"))
    per_token = (long - short) / (512 - 32)
    return Machine(
        seats=SEATS, step_s=one - slope, step_per_request_s=slope,
        prefill_s=short - 32 * per_token, prefill_per_token_s=per_token,
        fetch_s=fetch_s, read_s=median_of("swap", "moves", "16", "seconds", "prepare"),
        place_s=median_of("swap", "moves", "16", "seconds", "place"), prompt_tokens=128, answer_tokens=64,
    )  # fmt: skip


def gpu(fetch_s: float) -> Machine:
    """A replica with a GPU, adapters of D_B 64 on the demo base's shape (35.7 MB): read and place are measured on the
    CPU, the fetch has the assumed network on top, everything else is assumed."""
    return Machine(
        seats=SEATS, step_s=0.010, step_per_request_s=0.0003, prefill_s=0.015, prefill_per_token_s=1 / 20_000,
        fetch_s=fetch_s + NETWORK_S + 35.7 * MB / NETWORK_BYTES_PER_S,
        read_s=median_of("swap", "moves", "64", "seconds", "prepare"),
        place_s=median_of("swap", "moves", "64", "seconds", "place"), prompt_tokens=512, answer_tokens=200,
    )  # fmt: skip


def measure_fetch(bottleneck: int, rounds: int) -> list[float]:
    """Seconds in which a server gets an adapter of the log store onto its disk: copied, hashed, renamed. The store is a
    folder on the same disk, and the files are in the page cache."""
    with tempfile.TemporaryDirectory() as name:
        objects = SharedFolder(Path(name) / "store")
        writer, reader = (LogStore.open(objects, Path(name) / cache) for cache in ("writer", "reader"))
        took: list[float] = []
        for number in range(rounds):
            staged = writer.stage()
            write_adapter(staged, DEMO, number, routed(bottleneck=bottleneck))
            digest = read_folder(staged, DEMO).digest
            writer.add(f"adapter-{number}", staged, digest, "PERFT", activate=True)
            writer.discard(staged)
            reader.catch_up()
            began = time.perf_counter()
            reader.fetch(digest)
            took.append(time.perf_counter() - began)
        writer.close()
        reader.close()
    return took
