"""Owns turns on the event loop: one client's long work at a time.

Invariant: whatever many clients send at once, at least half of the event loop's time stays for everybody else.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SHORTEST_PAUSE_S = 0.01


class Turns:
    """Turns on the event loop, first come, first served."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold the turn for work on the loop, which may pause but waits for nothing else: no store, no adapter."""
        await self._lock.acquire()
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._free_later(began)

    async def step(self) -> None:
        """Return once the caller has its turn, which lasts until its task waits for something."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._free_later, loop.time())

    def _free_later(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(max(loop.time() - began, SHORTEST_PAUSE_S), self._lock.release)
