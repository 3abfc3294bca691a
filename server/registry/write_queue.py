"""Owns how changes to the store are carried out: in turns, whole, off the event loop.

Invariant: a change that has begun comes to its end, also if who asked for it goes away or the server is closed.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import anyio

from adapters import StorageFullError, StoreError
from server.errors import ApiError

P = ParamSpec("P")
T = TypeVar("T")


class WriteQueue:
    """What is under way. one_at_a_time: held while the store is changed, and never while an adapter is loaded."""

    def __init__(self) -> None:
        self.one_at_a_time = asyncio.Lock()
        self._names: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._disk = ThreadPoolExecutor(1, "perft-store")

    def of(self, name: str) -> asyncio.Lock:
        """Held by a change to `name` from its first look to its last; taken before `one_at_a_time`."""
        lock = self._names.get(name)
        if lock is None:
            lock = self._names[name] = asyncio.Lock()
        return lock

    def begin(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Carry a change out on a task of its own."""
        task = asyncio.get_running_loop().create_task(change)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def whole(self, change: Coroutine[Any, Any, T]) -> T:
        """Carry a change out to its end, and come back only then, also where the caller is cancelled."""
        task = self.begin(change)
        try:
            return await asyncio.shield(task)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])

    async def on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks on the one thread beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, lambda: work(*args, **kwargs))

    async def in_store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for the store's own methods. Raises ApiError for the store's errors."""
        with store_errors():
            return await self.on_disk(work, *args, **kwargs)

    async def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def close(self) -> None:
        self._disk.shutdown()


@contextmanager
def store_errors() -> Iterator[None]:
    """The store's own errors as API.md's."""
    try:
        yield
    except StorageFullError as error:
        raise ApiError(507, "storage_full", str(error)) from error
    except StoreError as error:
        raise ApiError(503, "adapter_unavailable", f"the store cannot be changed: {error}", retry_after=60) from error
