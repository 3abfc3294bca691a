"""Owns what the engine is told: every move of a content between disk, host and device, from its start to its end.

Invariant: a resident makes one move at a time, and every move settles, whatever the engine raises. A place that was
promised is given back only once the engine was told to free it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from adapters.ref import AdapterRef
from server.engine.protocol import AdapterLoadError, Engine
from server.residency.state import GRACE_S, Failure, Resident

logger = logging.getLogger(__name__)
Loaded = Literal["host", "device"]


class Events(Protocol):
    """Who is told of loads and evictions (the metrics)."""

    def load_finished(self, tier: Loaded, seconds: float, result: Literal["ok", "failed"]) -> None: ...

    def evicted(self, tier: Loaded) -> None: ...


class Transfers:
    """Starts moves on background tasks; `settled` is called after each, with the resident that was read to the host."""

    def __init__(
        self, engine: Engine, events: Events, clock: Callable[[], float], settled: Callable[[Resident | None], None]
    ) -> None:
        self._engine, self._events, self._clock, self._settled = engine, events, clock, settled
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, resident: Resident) -> None:
        """Disk to host."""
        resident.start("reading")
        self.spawn(self._load(resident, "host", partial(self._engine.prepare, resident.any_owner)))

    def place(self, resident: Resident, leaving: Sequence[Resident]) -> None:
        """Host to device, into the place of those that leave; theirs is promised from now on."""
        resident.start("placing")
        resident.holds_place = True
        for other in leaving:
            other.start("leaving")
            other.on_device = other.holds_place = False
            self._events.evicted("device")
        evict = [other.any_owner for other in leaving]
        self.spawn(self._load(resident, "device", partial(self._place, resident.any_owner, evict), leaving))

    def drop(self, resident: Resident) -> None:
        """Give the host's copy up."""
        resident.start("dropping")
        resident.on_host = False
        self._events.evicted("host")
        self.spawn(self._drop(resident, resident.any_owner))

    async def free(self, resident: Resident, last_owner: AdapterRef) -> None:
        """Take what nobody owns any more off the device and the host. If it has an owner when that begins (another
        version, or the same content came again), it stays where it is."""
        resident.start("freeing")
        try:
            while not resident.owners and (grace := resident.idle_since + GRACE_S - self._clock()) > 0:
                await asyncio.sleep(max(grace, 0.001))
            if resident.owners:
                return
            resident.on_device = False
            if resident.holds_place:
                await self.tell(self._engine.evict(last_owner))
            if resident.on_host:
                await self.tell(self._engine.drop(last_owner))
            resident.holds_place = resident.on_host = False
        finally:
            resident.settle()

    async def forget(self, adapter: AdapterRef) -> None:
        """The version is gone for ever."""
        await self.tell(self._engine.forget(adapter))

    async def tell(self, order: Awaitable[None]) -> None:
        """Have something freed. An engine that fails at that is down, and holds nothing that would be missed."""
        try:
            await order
        except Exception:
            logger.exception("the engine failed to free an adapter")

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run on a task of its own: who waits for it may go away."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(
        self, resident: Resident, tier: Loaded, order: Callable[[], Awaitable[None]], leaving: Collection[Resident] = ()
    ) -> None:
        """Carry out a move upwards; a failure is kept for those who wait."""
        began = self._clock()
        try:
            await order()
        except BaseException as error:
            resident.failed = Failure(_reason(error), self._clock())
            resident.holds_place = False
            if not isinstance(error, Exception):
                raise
        else:
            resident.failed, resident.last_used = None, self._clock()
            if tier == "host":
                resident.on_host = True
            else:
                resident.on_device = True
        finally:
            for moved in (resident, *leaving):
                moved.settle()
            self._events.load_finished(tier, self._clock() - began, "failed" if resident.failed else "ok")
            self._settled(resident if tier == "host" else None)

    async def _place(self, adapter: AdapterRef, evict: Sequence[AdapterRef]) -> None:
        try:
            await self._engine.place(adapter, evict)
        except AdapterLoadError:
            raise
        except Exception:
            await self.tell(self._engine.evict(adapter))  # nobody knows how far it got
            raise

    async def _drop(self, resident: Resident, owner: AdapterRef) -> None:
        try:
            await self.tell(self._engine.drop(owner))
        finally:
            resident.settle()
            self._settled(None)


def _reason(error: BaseException) -> str:
    """What a user is told of a failed move."""
    return str(error) if isinstance(error, AdapterLoadError) else f"the engine failed ({type(error).__name__})"
