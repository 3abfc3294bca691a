"""Owns answers that many ask for at once: made at most once a second, for all of them.

Invariant: nothing runs while nobody asks, and never two pieces of work for the same at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

EVERY_S = 1.0
MOST_KEPT = 64
"""Answers, of different questions."""
T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Work(Generic[T]):
    began: float
    task: asyncio.Task[T]


class OncePerSecond(Generic[Key, T]):
    """Work that is begun at most once in EVERY_S per key. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: dict[Key, _Work[T]] = {}

    async def result(self, key: Key, work: Callable[[], Awaitable[T]]) -> T:
        """What the work of this key returned, or raises, that runs or was begun within EVERY_S; else begin it."""
        now = self._clock()
        found = self._latest.get(key)
        if found is None or self._is_old(found, now):
            kept = {other: each for other, each in self._latest.items() if not self._is_old(each, now)}
            self._latest = dict(list(kept.items())[-MOST_KEPT + 1 :])
            found = self._latest[key] = _Work(now, asyncio.ensure_future(_awaited(work)))
        return await asyncio.shield(found.task)

    def _is_old(self, work: _Work[T], now: float) -> bool:
        return work.task.done() and now - work.began >= EVERY_S


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
