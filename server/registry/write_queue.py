"""Owns how changes to the store are made: one at a time, whole, off the event loop.

Invariant: a change that has begun is finished, even if its caller goes away or the server is closed.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import anyio

P = ParamSpec("P")
T = TypeVar("T")


class WriteQueue:
    """The changes under way. store_lock: held while the store is changed, and never while an adapter is loaded."""

    def __init__(self) -> None:
        self.store_lock = asyncio.Lock()
        self._name_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._store_thread = ThreadPoolExecutor(1, "perft-store")

    def name_lock(self, name: str) -> asyncio.Lock:
        """Held by a change to `name` from its first read to its last write; acquired before `store_lock`."""
        lock = self._name_locks.get(name)
        if lock is None:
            lock = self._name_locks[name] = asyncio.Lock()
        return lock

    def start(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Carry a change out on a task of its own."""
        task = asyncio.get_running_loop().create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, change: Coroutine[Any, Any, T]) -> T:
        """Carry a change out to its end, and return only then, even if the caller is cancelled."""
        task = self.start(change)
        try:
            return await asyncio.shield(task)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work on the one thread beside the event loop that touches the store."""
        return await asyncio.get_running_loop().run_in_executor(self._store_thread, lambda: work(*args, **kwargs))

    async def drain(self) -> None:
        """Wait until no change is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        self._store_thread.shutdown()
