"""Owns how viewers of the console share the metrics: one rendering a second, whoever and however many ask.

Invariant: nothing runs while nobody asks, and never two renderings of the same at once.
"""

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool

EVERY_S = 1.0
T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Page(Protocol):
    """What renders the metrics. `refresh` asks the workers for their counters; `choice` is slow with many adapters."""

    async def refresh(self) -> None: ...

    def choice(self, adapter: str | None) -> bytes: ...


@dataclass(frozen=True)
class _Work(Generic[T]):
    began: float
    task: asyncio.Task[T]


class _Shared(Generic[Key, T]):
    """Work that is begun at most once in EVERY_S per key; all who ask meanwhile get its result, or its error."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._latest: dict[Key, _Work[T]] = {}

    async def result(self, key: Key, work: Callable[[], Awaitable[T]]) -> T:
        now = self._clock()
        found = self._latest.get(key)
        if found is None or self._is_old(found, now):
            self._latest = {other: kept for other, kept in self._latest.items() if not self._is_old(kept, now)}
            found = self._latest[key] = _Work(now, asyncio.ensure_future(_awaited(work)))
        return await asyncio.shield(found.task)

    def _is_old(self, work: _Work[T], now: float) -> bool:
        return work.task.done() and now - work.began >= EVERY_S


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


class OncePerSecond:
    """The metrics of the console (server.api.dependencies.SharedMetrics). clock: monotonic seconds."""

    def __init__(self, page: Page, clock: Callable[[], float] = time.monotonic) -> None:
        self._page = page
        self._refreshed = _Shared[None, None](clock)
        self._rendered = _Shared[str | None, tuple[bytes, bytes]](clock)

    async def text(self, adapter: str | None = None) -> tuple[bytes, bytes]:
        """The choice of all adapters' metrics, or one adapter's series: as they are, and compressed with gzip."""
        return await self._rendered.result(adapter, lambda: self._render(adapter))

    async def _render(self, adapter: str | None) -> tuple[bytes, bytes]:
        await self._refreshed.result(None, self._page.refresh)
        return await run_in_threadpool(self._rendering, adapter)

    def _rendering(self, adapter: str | None) -> tuple[bytes, bytes]:
        plain = self._page.choice(adapter)
        return plain, gzip.compress(plain, compresslevel=1)
