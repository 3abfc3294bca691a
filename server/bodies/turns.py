"""Owns what large bodies share: the memory that they take together, and the event loop, one at a time.

Invariant: whatever many clients send at once, at least half of the event loop's time stays for everybody else.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SHORTEST_PAUSE_S = 0.01


class Turns:
    """Turns in the order of asking."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Work here, on the loop, without waiting for anything else than a pause of one's own."""
        await self._lock.acquire()
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._free_later(began)

    async def step(self) -> None:
        """Return when it is one's turn; the turn lasts as long as the caller's task goes on without waiting."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._free_later, loop.time())

    def _free_later(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(max(loop.time() - began, SHORTEST_PAUSE_S), self._lock.release)


class BodyBudget:
    """Bytes of memory for large bodies; who finds too few left waits its turn. total: bytes."""

    def __init__(self, total: int) -> None:
        self._total = self.free = total
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> Callable[[], None]:
        """Take `size` bytes, as soon as they are free. Returns what gives them back, once."""
        size = min(size, self._total)
        if self._waiters or size > self.free:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append((size, waiter))
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._give(size)
                else:
                    self._waiters.remove((size, waiter))
                    self._wake()
                raise
        else:
            self.free -= size
        taken = [size]
        return lambda: self._give(taken.pop()) if taken else None

    def _give(self, size: int) -> None:
        self.free += size
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._waiters[0][0] <= self.free:
            size, waiter = self._waiters.popleft()
            if not waiter.done():
                self.free -= size
                waiter.set_result(None)
