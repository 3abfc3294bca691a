"""Owns how changes to the store are made: whole, off the event loop, one at a time for each name.

Invariant: a change that has begun is finished, even if its caller goes away or the server is closed. No name waits for
the files of another: what takes long with large files (`beside`) has threads of its own.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import anyio

P = ParamSpec("P")
T = TypeVar("T")
FILE_THREADS = 4


class WriteQueue:
    """The changes under way."""

    def __init__(self) -> None:
        self._name_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._record_thread = ThreadPoolExecutor(1, "perft-store")
        self._file_threads = ThreadPoolExecutor(FILE_THREADS, "perft-store-files")

    def name_lock(self, name: str) -> asyncio.Lock:
        """Held by a change to `name` from its first read to its last write."""
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
        """Run blocking work of a moment: a record, a line of the audit log."""
        return await _run(self._record_thread, partial(work, *args, **kwargs))

    async def beside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work that may take long, because files may be large; records are written meanwhile."""
        return await _run(self._file_threads, partial(work, *args, **kwargs))

    async def drain(self) -> None:
        """Wait until no change is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        self._record_thread.shutdown()
        self._file_threads.shutdown()


async def _run(threads: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
