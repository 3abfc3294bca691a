"""Owns the moves of contents between disk, host and device, from the call of the engine to its end.

Invariant: a resident makes one move at a time, and every move settles, whatever the engine raises. Promised room is
given back only once the engine was asked to free it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from adapters.ref import AdapterRef
from server.engine.protocol import AdapterLoadError, Engine, LoadedTier, ReadFiles
from server.errors import EngineUnavailableError
from server.residency.state import GRACE_S, Failure, Resident

logger = logging.getLogger(__name__)


class TransferEvents(Protocol):
    """What counts loads, evictions and repairs (the metrics). seconds: how long a load took."""

    def load_finished(self, tier: LoadedTier, seconds: float, result: Literal["ok", "failed"]) -> None: ...

    def evicted(self, tier: LoadedTier) -> None: ...

    def repaired(self, tier: LoadedTier) -> None: ...


class Transfers:
    """Starts moves on background tasks; `on_settled` is called after each, with the resident that was read to the
    host. read_files: has an adapter's files at hand while the engine reads them; raises AdapterLoadError."""

    def __init__(
        self,
        engine: Engine,
        events: TransferEvents,
        clock: Callable[[], float],
        on_settled: Callable[[Resident | None], None],
        read_files: ReadFiles,
    ) -> None:
        self._engine, self._events, self._clock, self._on_settled = engine, events, clock, on_settled
        self._read_files = read_files
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, resident: Resident) -> None:
        """Disk to host; before that, from the store to the disk."""
        resident.start("reading")
        self.spawn(self._load(resident, "host", partial(self._prepare, resident.any_owner)))

    def place(self, resident: Resident, evicted: Sequence[Resident]) -> None:
        """Host to device, into the room of the `evicted`, which is promised from now on."""
        resident.start("placing")
        resident.holds_room = True
        for other in evicted:
            other.start("evicting")
            other.on_device = other.holds_room = False
            self._events.evicted("device")
        evict = [other.any_owner for other in evicted]
        self.spawn(self._load(resident, "device", partial(self._place, resident.any_owner, evict), evicted))

    def drop(self, resident: Resident) -> None:
        """Drop the host's copy."""
        resident.start("dropping")
        resident.on_host = False
        self._events.evicted("host")
        self.spawn(self._drop(resident, resident.any_owner))

    async def free(self, resident: Resident, last_owner: AdapterRef) -> None:
        """Take a content without a version off the device and the host. If it has one again when that begins (the same
        content was uploaded once more), it stays."""
        resident.start("freeing")
        try:
            while not resident.owners and (grace_s := resident.idle_since + GRACE_S - self._clock()) > 0:
                await asyncio.sleep(max(grace_s, 0.001))
            if resident.owners:
                return
            resident.on_device = resident.is_lost = False
            if resident.holds_room:
                await self._try_to_free(self._engine.evict(last_owner))
                resident.holds_room = False
            if resident.on_host and not resident.owners:
                resident.on_host = False
                await self._try_to_free(self._engine.drop(last_owner))
        finally:
            resident.settle()

    async def forget(self, adapter: AdapterRef) -> None:
        """The version is gone for good."""
        await self._try_to_free(self._engine.forget(adapter))

    def repair(self, resident: Resident, lost: Collection[LoadedTier]) -> None:
        """The engine lost what it should hold: free the rest of it there, or load it again while requests run on it."""
        resident.start("repairing")
        if "device" in lost:
            resident.is_lost = bool(resident.running or resident.pinned_by)
            resident.on_device = resident.is_lost
        if "host" in lost:
            resident.on_host = False
        for tier in lost:
            self._events.repaired(tier)
        self.spawn(self._repair(resident, resident.any_owner, lost))

    def discard(self, key: str, tier: LoadedTier) -> None:
        """The engine holds what it should not: free it."""
        self._events.repaired(tier)
        self.spawn(self._try_to_free(self._engine.discard(key, tier)))

    async def _try_to_free(self, call: Awaitable[None]) -> None:
        """Await a call that frees something. An engine that fails at that is down, and holds nothing that matters."""
        try:
            await call
        except Exception:
            logger.exception("the engine failed to free an adapter")

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run on a task of its own: a caller that awaits it may be cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(
        self,
        resident: Resident,
        tier: LoadedTier,
        call: Callable[[], Awaitable[None]],
        evicted: Collection[Resident] = (),
    ) -> None:
        """Carry out a move upwards; a failure is kept for the waiters."""
        began = self._clock()
        try:
            await call()
        except BaseException as error:
            resident.failed = _failure(error, self._clock())
            resident.holds_room = False
            if not isinstance(error, Exception):
                raise
        else:
            resident.failed, resident.last_used = None, self._clock()
            if tier == "host":
                resident.on_host = True
            else:
                resident.on_device = True
        finally:
            for moved in (resident, *evicted):
                moved.settle()
            self._events.load_finished(tier, self._clock() - began, "failed" if resident.failed else "ok")
            self._on_settled(resident if tier == "host" else None)

    async def _prepare(self, adapter: AdapterRef) -> None:
        await self._read_files(adapter, self._engine.prepare)

    async def _place(self, adapter: AdapterRef, evict: Sequence[AdapterRef]) -> None:
        try:
            await self._engine.place(adapter, evict)
        except AdapterLoadError:
            raise
        except Exception:
            await self._try_to_free(self._engine.evict(adapter))  # how far it got is not known
            raise

    async def _drop(self, resident: Resident, owner: AdapterRef) -> None:
        try:
            await self._try_to_free(self._engine.drop(owner))
        finally:
            resident.settle()
            self._on_settled(None)

    async def _repair(self, resident: Resident, owner: AdapterRef, lost: Collection[LoadedTier]) -> None:
        try:
            if resident.is_lost:
                await self._prepare(owner)
                await self._engine.place(owner)
                resident.last_used = self._clock()
                resident.is_lost, resident.on_host, resident.failed = False, True, None
                return
            for tier in lost:
                await self._try_to_free(self._engine.discard(owner.key, tier))
            if "device" in lost:
                resident.holds_room = False
        except Exception as error:
            resident.failed = _failure(error, self._clock())
            logger.exception("%s is lost on the engine and could not be loaded again; retrying", owner.name)
        finally:
            resident.settle()
            self._on_settled(None)


def _failure(error: BaseException, now: float) -> Failure:
    """A failed move, with the reason as callers see it."""
    is_of_engine = isinstance(error, EngineUnavailableError)
    is_told = is_of_engine or isinstance(error, AdapterLoadError)
    return Failure(str(error) if is_told else f"the engine failed ({type(error).__name__})", now, is_of_engine)
