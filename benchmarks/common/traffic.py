"""Owns a cheap client: streamed completions of one server, many at once in one asyncio loop.

Invariant: every request gets all the tokens that it asked for (`ignore_eos`); anything else raises.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common.rounds import percentile

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Request:
    """One completion. model: a served name. prompt: token ids."""

    model: str
    prompt: Sequence[int]
    tokens: int


@dataclass(frozen=True)
class Run:
    """Requests that ran together. arrivals_s: for each request, when its events came, in seconds from the start.

    wall_s, client_cpu_s: of the whole run; the second is this process's processor time.
    """

    requests: Sequence[Request]
    arrivals_s: list[list[float]]
    wall_s: float
    client_cpu_s: float

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.requests)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over the whole run, prefill included."""
        return self.tokens / self.wall_s

    @property
    def decode_tokens_per_second(self) -> float:
        """Output tokens from the moment when every request has its first to the moment when the first one ends.

        Only for requests that start together. Raises ValueError if they never all decode at once.
        """
        start, end = max(own[0] for own in self.arrivals_s), min(own[-1] for own in self.arrivals_s)
        if end <= start:
            raise ValueError("found no time at which all requests decode: ask for more tokens")
        return sum(start < when <= end for own in self.arrivals_s for when in own) / (end - start)

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between neighbouring events of a stream, of all streams."""
        return [1000 * (b - a) for own in self.arrivals_s for a, b in pairwise(own)]

    @property
    def first_token_ms(self) -> list[float]:
        """Milliseconds from the run's start to each first token; only for requests that start together."""
        return [1000 * own[0] for own in self.arrivals_s]

    @property
    def merged(self) -> int:
        """Tokens that came in one event with the token before."""
        return self.tokens - sum(len(own) for own in self.arrivals_s)

    def as_json(self) -> dict[str, Any]:
        return {
            "wall_s": round(self.wall_s, 3), "tokens": self.tokens, "merged": self.merged,
            "client_cpu_share": round(self.client_cpu_s / self.wall_s, 3),
            **{f"gap_p{share}_ms": round(percentile(self.gaps_ms, share / 100), 2) for share in (50, 99)},
        }  # fmt: skip


class Client:
    """A client of the server at `url`; `key` is its admin key, if it has one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def together(self, requests: Sequence[Request]) -> Run:
        """Start all requests at once."""
        return self.at_most(requests, len(requests))

    def at_most(self, requests: Sequence[Request], at_once: int) -> Run:
        """Run the requests in their order, `at_once` of them at a time."""
        return asyncio.run(self._run(requests, at_once))

    def upload(self, folders: dict[str, Path]) -> None:
        """Upload and activate adapters, by name."""
        asyncio.run(self._upload(folders))

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = asyncio.run(self._get("/metrics")).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    async def _run(self, requests: Sequence[Request], at_once: int) -> Run:
        arrivals: list[list[float]] = [[] for _ in requests]
        waiting = iter(range(len(requests)))
        async with self._session() as session:
            cpu, start = time.process_time(), time.perf_counter()

            async def work() -> None:
                for place in waiting:
                    await _stream(session, requests[place], arrivals[place], start)

            await asyncio.gather(*(work() for _ in range(at_once)))
            return Run(requests, arrivals, time.perf_counter() - start, time.process_time() - cpu)

    async def _upload(self, folders: dict[str, Path]) -> None:
        async with self._session() as session:
            for name, folder in folders.items():
                form = aiohttp.FormData({"name": name})
                for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
                    form.add_field(part, (folder / file).read_bytes(), filename=file)
                async with session.post("/v1/adapters", data=form) as response:
                    if response.status not in (200, 201):
                        raise RuntimeError(f"upload of {name}: {response.status} {await response.text()}")

    async def _get(self, path: str) -> str:
        async with self._session() as session, session.get(path) as response:
            response.raise_for_status()
            return await response.text()

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.url,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),
        )


async def _stream(session: aiohttp.ClientSession, request: Request, arrivals: list[float], start: float) -> None:
    """Read one stream to its end; `arrivals` gets the time of every event. Raises RuntimeError for any failure."""
    body = {
        "model": request.model, "prompt": list(request.prompt), "max_tokens": request.tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    ended = False
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{request.model}: {response.status} {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    raise RuntimeError(line.decode())
                arrivals.append(time.perf_counter() - start)
            ended = ended or line.startswith(b"data: [DONE]")
    if not ended or not 0.5 * request.tokens <= len(arrivals) <= request.tokens:
        raise RuntimeError(f"{request.model}: found {len(arrivals)} events, expected {request.tokens}; ended: {ended}")
