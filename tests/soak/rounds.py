"""Rounds of upload, serve and delete on a real server, after each of which everything must be as before.

Between, what else leaves something behind in a careless server: an upload that is refused, one that is cut off, a
stream whose reader goes away, a name nobody has. Names come back in one round and are new in the next.
"""

import statistics
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.tiny_server import TinyClient, long_prompt
from tests.soak.contents import content_of
from tests.soak.measures import FLAT, Measure, measure, slope
from tests.store_contents import Content

BOTTLENECK = 64
"""Adapters as large as the pool takes two of: one that is not let go shows at once."""
TOKENS = 8
MIB = 1024**2


@dataclass(frozen=True)
class Tolerance:
    """What memory may grow by in a round, and descriptors, threads and metrics in all the rounds that count."""

    api_bytes: float
    engine_bytes: float
    others: int


SHORT = Tolerance(api_bytes=100_000, engine_bytes=100_000, others=3)
"""For a few dozen rounds: a fifth of an adapter, which the weights of one would exceed five times."""
FULL = Tolerance(api_bytes=8_000, engine_bytes=8_000, others=3)
"""For hundreds of rounds. safetensors 0.8.0 itself keeps 56 bytes of every tensor that it reads, 2 kB a round here."""


@dataclass
class Rounds:
    """A server and its rounds. `run` carries them out; `problems` judges them."""

    server: ServerProcess
    store: Path
    content: Content
    seed: int
    measures: list[Measure] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = TinyClient(self.server.url, tiny_server.KEYS["admin"])
        self.random = Random(self.seed)
        self.used = 0

    def run(self, count: int) -> None:
        """Raises AssertionError with the round's number and seed for a round that goes wrong."""
        try:
            for number in range(count):
                began = time.monotonic()
                self._round(number)
                self.round_s.append(time.monotonic() - began)
                self.measures.append(measure(self.server, self.client, self.store))
        except Exception as error:
            raise AssertionError(f"seed {self.seed}, round {len(self.measures)}: {error!r}") from error
        finally:
            self.client.close()

    def _round(self, number: int) -> None:
        name = "again" if number % 2 else f"round-{number}"
        upload = self._upload(name, self._weights())
        assert upload.status_code == 201, upload.text
        version = max(v["version"] for v in upload.json()["versions"])
        answer = self.client.complete(name, long_prompt(self.random.randrange(10**6), 24), TOKENS)
        assert answer.model == f"{name}@{version}" and len(answer.tokens) == TOKENS
        pinned = self.client.stream_tokens(f"{name}@{version}", long_prompt(self.random.randrange(10**6), 24), TOKENS)
        assert len(pinned) == TOKENS
        self._go_wrong(number, name)
        assert self.client.http.delete(f"/v1/adapters/{name}").status_code == 202
        self._wait_until_gone(name)

    def _go_wrong(self, number: int, name: str) -> None:
        """One of the things that end badly; each comes again every fourth round."""
        match number % 4:
            case 0:
                refused = self._upload(name, self._weights()[:-4])
                assert refused.status_code == 400, refused.text
            case 1:
                self._cut_off_an_upload()
            case 2:
                stream = self.client.stream(name, long_prompt(self.random.randrange(10**6), 24), 64)
                next(stream)
                stream.close()
            case 3:
                body = TinyClient.body(f"nobody-{self.random.randrange(10**9)}", [5, 6], 1)
                assert self.client.http.post("/v1/completions", json=body).status_code == 404

    def _weights(self) -> bytes:
        """Weights never used before: the last tensor's first value counts up."""
        self.used += 1
        return self.content.weights[:-4] + struct.pack("<f", self.used / 1000)

    def _upload(self, name: str, weights: bytes) -> httpx.Response:
        files = {"config": self.content.config, "weights": weights}
        return self.client.http.post("/v1/adapters", data={"name": name}, files=files)

    def _cut_off_an_upload(self) -> None:
        request = self.client.http.build_request(
            "POST", "/v1/adapters", data={"name": "cut"}, files={"config": b"{", "weights": self.content.weights}
        )
        body = request.read()

        def half() -> Any:
            yield body[: len(body) // 2]
            raise _GoneError

        with suppress(_GoneError):
            self.client.http.post("/v1/adapters", headers=dict(request.headers), content=half())

    def _wait_until_gone(self, name: str) -> None:
        """Out of the list, and what a stream that was left alone still held is let go."""
        deadline = time.monotonic() + LIMIT_S
        while self.client.http.get(f"/v1/adapters/{name}").status_code != 404 or list(self.store.glob("staging/*")):
            assert time.monotonic() < deadline, f"{name} is still there, or staging/ holds something"
            time.sleep(0.02)

    def counted(self) -> list[Measure]:
        """The measures after the warm-up: caches, arenas and threads are as large as they get."""
        return self.measures[len(self.measures) // 4 :]

    def growth(self) -> dict[str, float]:
        """Of everything measured: per round for memory, from first to last for the rest."""
        found: dict[str, float] = {}
        for measured in fields(Measure):
            values = [getattr(each, measured.name) for each in self.counted()]
            found[measured.name] = slope(values) if measured.name.endswith("rss") else values[-1] - values[0]
        return found

    def problems(self, tolerance: Tolerance) -> list[str]:
        """What is not flat."""
        found = [
            f"{name}: {sorted({getattr(each, name) for each in self.measures})}, expected one value"
            for name in FLAT
            if len({getattr(each, name) for each in self.measures}) > 1
        ]
        allowed = {"api_rss": tolerance.api_bytes, "engine_rss": tolerance.engine_bytes}
        for name, growth in self.growth().items():
            if name not in FLAT and growth > allowed.get(name, tolerance.others):
                values = [getattr(each, name) for each in self.counted()]
                found.append(f"{name} grows by {growth:.1f}: {values}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Twenty points of every curve, and how it grows."""
        step = max(1, len(self.measures) // 20)
        curves = {
            measured.name: [_shown(measured.name, getattr(each, measured.name)) for each in self.measures[::step]]
            for measured in fields(Measure)
        }
        growth = {
            f"{name}, {'bytes a round' if name.endswith('rss') else 'last less first'}": round(value, 1)
            for name, value in self.growth().items()
        }
        return {
            "rounds": len(self.measures),
            "bytes of an adapter on the host": len(self.content.weights),
            "curves (memory in MiB), every so many rounds": {"rounds": step} | curves,
            "growth after the first quarter": growth,
            "seconds a round, median": round(statistics.median(self.round_s), 3),
            "seconds": round(sum(self.round_s), 1),
        }


class _GoneError(Exception):
    """The client stops in the middle of a body."""


def _shown(name: str, value: float) -> float:
    return round(value / MIB, 1) if name.endswith("rss") else value


def content_for_rounds(folder: Path) -> Content:
    return content_of(tiny_server.adapter(folder, 3, bottleneck=BOTTLENECK), tiny_server.BASE)
