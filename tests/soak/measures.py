"""What a server holds, from /metrics, /proc and the store's folder alone, and how fast a curve of it grows."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import psutil

from tests.server.processes import ServerProcess
from tests.server.tiny_server import Samples, TinyClient

MAX_POINTS = 200


@dataclass(frozen=True)
class Measure:
    """Between two rounds. api: the process that serves HTTP; engine: all that it started, together."""

    rows: float
    """Of the device's pool, taken."""
    store_bytes: float
    files: int
    """In the store's folder, folders included; without the bounded number that remember deleted names."""
    series: int
    """Samples on the page of metrics."""
    models: int
    """Listed by GET /v1/models."""
    api_rss: int
    engine_rss: int
    api_descriptors: int
    engine_descriptors: int
    api_threads: int
    engine_threads: int


FLAT = ("rows", "store_bytes", "files", "models")
"""What is the same after every round, from the first on."""


def measure(server: ServerProcess, client: TinyClient, store: Path) -> Measure:
    samples = Samples.of(client.metrics())
    api = psutil.Process(server.process.pid)
    engine = api.children(recursive=True)
    return Measure(
        rows=samples.total("perft_device_rows_used"),
        store_bytes=samples.total("perft_store_bytes"),
        files=sum(1 for path in store.rglob("*") if path.parent.name != "deleted"),
        series=len(samples.values),
        models=len(client.http.get("/v1/models").raise_for_status().json()["data"]),
        api_rss=api.memory_info().rss,
        engine_rss=sum(process.memory_info().rss for process in engine),
        api_descriptors=api.num_fds(),
        engine_descriptors=sum(process.num_fds() for process in engine),
        api_threads=api.num_threads(),
        engine_threads=sum(process.num_threads() for process in engine),
    )


def slope(values: Sequence[float]) -> float:
    """Growth from one value to the next: the median over all pairs (Theil-Sen), which a single jump does not move."""
    step = max(1, len(values) // MAX_POINTS)
    points = list(enumerate(values))[::step]
    return statistics.median((later - earlier) / (m - n) for (n, earlier), (m, later) in combinations(points, 2))
