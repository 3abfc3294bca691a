"""Owns which adapter is where (disk, host, device), who waits for a place, and who has to leave.

The engine only carries out what is decided here, so what is admitted cannot fail to activate: its place is promised
before it goes there, and nobody's is taken while a request uses it. Invariant: the promised rows and slots never exceed
the pools, nor the adapters with requests the engine's step.

Waiters are served first come, first served, except that for `PATIENCE_S` a later one may take what would not be enough
for an earlier one. Then the earlier one closes adapters to new requests until there is enough for it; once it is served
or gone, they are open again. Whose adapter is ready and open waits for nobody.

All on one event loop; nothing here blocks. Every change ends in a new look over the waiters (`_look_again`).
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

from adapters.ref import AdapterRef
from server.api.schemas import Residency as Tier
from server.engine.protocol import Engine
from server.errors import ApiError
from server.residency.allocation import NEVER, AdmissionHolds, SchedulingPass
from server.residency.state import GRACE_S, POOLS, Capacity, Need, Resident, Waiter
from server.residency.transfers import Events, Transfers

__all__ = ["GRACE_S", "PATIENCE_S", "RETRY_FAILED_S", "Capacity", "Events", "Need", "ResidencyScheduler"]

PATIENCE_S = 0.5
"""How long a waiting request lets later ones pass."""
RETRY_FAILED_S = 10.0
"""How long a failed load is answered with its failure before it is tried again."""


class ResidencyScheduler:
    """See the module."""

    def __init__(
        self, engine: Engine, capacity: Capacity, events: Events, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.capacity, self._clock = capacity, clock
        self._moves = Transfers(engine, events, clock, self._moved)
        self._residents: dict[str, Resident] = {}
        self._running: dict[int, int] = {}
        self._waiters: dict[Waiter, None] = {}
        self._waiting: Counter[int] = Counter()
        self._closed = AdmissionHolds()
        self._newest: Resident | None = None
        self._timer: asyncio.TimerHandle | None = None

    # What is known

    def add(self, adapter: AdapterRef, need: Need) -> None:
        """Make a version known. Nothing is loaded."""
        self._residents.setdefault(adapter.key, Resident(need)).owners[adapter.engine_id] = adapter

    async def remove(self, adapter: AdapterRef) -> None:
        """A version is gone: free what only it held. What still waits for it, or holds a lease, is at its end."""
        resident = self._residents[adapter.key]
        del resident.owners[adapter.engine_id]
        resident.removals += 1
        resident.pinned_by.discard(adapter.engine_id)
        if adapter.engine_id in resident.running:
            self._end_leases(resident, adapter.engine_id)
        self.fail_waiters(adapter, _gone(adapter))
        await asyncio.shield(self._moves.spawn(self._remove(resident, adapter)))

    async def _remove(self, resident: Resident, adapter: AdapterRef) -> None:
        while resident.move is not None:
            await resident.settled.wait()
        try:
            await self._moves.free(resident, adapter)
        finally:
            resident.removals -= 1
            if not resident.owners and not resident.removals:
                del self._residents[adapter.key]
            self._look_again()
        await self._moves.forget(adapter)

    def tier(self, adapter: AdapterRef) -> Tier:
        resident = self._residents.get(adapter.key)
        return "disk" if resident is None else resident.tier

    def failure(self, adapter: AdapterRef) -> str | None:
        """Why the last load failed, None if it did not."""
        resident = self._residents.get(adapter.key)
        return None if resident is None or resident.failed is None else resident.failed.reason

    def waiting(self, adapter: AdapterRef) -> int:
        """Requests of a version that wait for the device."""
        return self._waiting[adapter.engine_id]

    @property
    def rows_used(self) -> int:
        """Rows that are promised (from any thread)."""
        return sum(r.need.rows for r in list(self._residents.values()) if r.holds_place)

    # Who asks

    async def load(self, adapter: AdapterRef) -> None:
        """Bring a version to the host. Raises ApiError adapter_unavailable if it cannot be read."""
        await self._wait(adapter, "host")

    @asynccontextmanager
    async def lease(self, adapter: AdapterRef, timeout_s: float, joins: bool = False) -> AsyncIterator[None]:
        """Hold a version on the device for one request; waits for its turn. joins: the caller holds a lease of the same
        version, so this one is counted in at once (to wait for those who wait for the first one would never end).

        Raises ApiError: adapter_unavailable (it cannot be loaded, or not in time), device_full (pins leave no room).
        """
        resident = self._resident(adapter)
        if (joins and adapter.engine_id in resident.running) or self._is_open(resident, adapter.engine_id):
            self._admit(resident, adapter.engine_id)
        else:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wait(adapter, "lease")
            except TimeoutError:
                raise _too_late(adapter, timeout_s) from None
        try:
            yield
        finally:
            self._release(resident, adapter.engine_id)

    async def pin(self, adapter: AdapterRef) -> None:
        """Keep a version on the device. Raises ApiError device_full if other pins leave no room for it."""
        resident = self._resident(adapter)
        if not resident.pinned_by and not self._pins_leave_room(resident.need):
            raise _device_full(adapter)
        resident.pinned_by.add(adapter.engine_id)
        try:
            await self._wait(adapter, "device")
        except BaseException:
            self.unpin(adapter)
            raise

    def unpin(self, adapter: AdapterRef) -> None:
        resident = self._residents.get(adapter.key)
        if resident is not None:
            resident.pinned_by.discard(adapter.engine_id)
            self._look_again()

    def fail_waiters(self, adapter: AdapterRef, error: ApiError) -> None:
        """End every wait for a version with `error`."""
        for waiter in [w for w in self._waiters if w.adapter.engine_id == adapter.engine_id]:
            self._end_wait(waiter, error)
        self._look_again()

    def check_integrity(self) -> None:
        """Raises AssertionError unless the promises fit, everything that runs is on the device, and nobody waits for
        something that will never come."""
        residents = self._residents.values()
        for pool in POOLS:
            mine = [r for r in residents if r.need.pool == pool]
            assert sum(r.need.size for r in mine if r.holds_place) <= self.capacity.of(pool), (
                f"too many {pool} promised"
            )
            assert sum(r.need.size for r in mine if r.pinned_by) <= self.capacity.of(pool), f"too many {pool} pinned"
        assert all(r.holds_place for r in residents if r.on_device), "on the device without a place"
        assert all(r.on_device for r in residents if r.running), "a request runs without a place"
        assert all(r.owners or r.removals for r in residents), "a content nobody owns is kept"
        running = {number: count for r in residents for number, count in r.running.items()}
        assert running == self._running and len(running) <= self.capacity.running, (running, self._running)
        assert self._waiters or (self._closed == AdmissionHolds() and self._timer is None), "closed for nobody"
        assert self._waiting == Counter(w.adapter.engine_id for w in self._waiters if w.wants == "lease")
        is_waited_for = any(not w.ready.done() for w in self._waiters)
        is_moving = any(r.is_busy for r in residents)
        assert not is_waited_for or is_moving or running or self._timer is not None, "nothing will end the waits"

    # Who waits

    async def _wait(self, adapter: AdapterRef, wants: Literal["host", "device", "lease"]) -> None:
        ready = asyncio.get_running_loop().create_future()
        waiter = Waiter(self._resident(adapter), adapter, wants, self._clock(), ready)
        self._waiters[waiter] = None
        if wants == "lease":
            self._waiting[adapter.engine_id] += 1
        try:
            self._look_again()
            await ready
        except BaseException:
            if waiter in self._waiters:
                self._leave_line(waiter)
                self._look_again()
            elif waiter.is_granted:
                self._release(waiter.resident, adapter.engine_id)
            raise

    def _leave_line(self, waiter: Waiter) -> None:
        del self._waiters[waiter]
        if waiter.wants == "lease":
            self._waiting[waiter.adapter.engine_id] -= 1
            if not self._waiting[waiter.adapter.engine_id]:
                del self._waiting[waiter.adapter.engine_id]

    def _end_wait(self, waiter: Waiter, error: ApiError | None) -> None:
        self._leave_line(waiter)
        if waiter.ready.done():
            return
        if error is None:
            waiter.ready.set_result(None)
        else:
            waiter.ready.set_exception(error)

    def _look_again(self) -> None:
        """Move every waiter on as far as it can go now, in the order they came."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiters:
            now = self._clock()
            look = SchedulingPass(self.capacity, self._residents.values(), self._running, self._closed, now)
            self._closed = look.closed
            for waiter in [w for w in self._waiters if not w.ready.done()]:
                self._advance(waiter, look)
            if look.wake < NEVER:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(max(0.0, look.wake - now) + 0.001, self._look_again)
        else:
            self._closed = AdmissionHolds()

    def _advance(self, waiter: Waiter, look: SchedulingPass) -> None:
        resident, wants = waiter.resident, waiter.wants
        if wants == "lease" and self._is_open(resident, waiter.adapter.engine_id):
            self._admit(resident, waiter.adapter.engine_id)
            look.places(resident).let_in(resident)
            waiter.is_granted = True
            self._end_wait(waiter, None)
        elif (resident.on_device and wants != "lease") or (resident.on_host and wants == "host"):
            self._end_wait(waiter, None)
        elif resident.on_device:
            self._await_turn(waiter, look)
        elif (error := self._refusal(waiter, look)) is not None:
            self._end_wait(waiter, error)
        elif not resident.is_busy:
            self._bring(waiter, look)

    def _bring(self, waiter: Waiter, look: SchedulingPass) -> None:
        """Start the next move towards the device; an activation is read whatever else is waiting on the host."""
        resident = waiter.resident
        if not resident.on_host:
            if look.host.allow(resident) or waiter.wants == "host":
                self._moves.read(resident)
        elif resident not in look.asked:
            look.asked.add(resident)
            look.host.count(resident)
            self._find_place(waiter, look)

    def _await_turn(self, waiter: Waiter, look: SchedulingPass) -> None:
        """It is on the device, but too many adapters run, or it is closed."""
        if look.closed.holds(waiter.resident, waiter.adapter.engine_id):
            return
        look.places(waiter.resident).keep(waiter.resident)
        if self._is_overdue(waiter, look):
            look.turns.close_for(waiter.adapter.engine_id)

    def _refusal(self, waiter: Waiter, look: SchedulingPass) -> ApiError | None:
        """Why there is no use in waiting: its load just failed, or pins leave no room."""
        failed = waiter.resident.failed
        if failed is not None and look.now < failed.at + RETRY_FAILED_S:
            return _failed(waiter.adapter, failed.reason, failed.at + RETRY_FAILED_S - look.now)
        if waiter.wants != "host" and not look.places(waiter.resident).can_ever_hold(waiter.resident):
            return _device_full(waiter.adapter)
        return None

    def _find_place(self, waiter: Waiter, look: SchedulingPass) -> None:
        """Start host to device if room can be made; else wait, and once patience is over, close for it."""
        places, needed = look.places(waiter.resident), waiter.resident.need.size
        leaving = places.give(needed)
        if leaving is not None:
            self._moves.place(waiter.resident, leaving)
            return
        look.wake_at(places.grace_ends)
        if self._is_overdue(waiter, look):
            places.close_for(needed)

    @staticmethod
    def _is_overdue(waiter: Waiter, look: SchedulingPass) -> bool:
        overdue_at = waiter.since + PATIENCE_S
        if look.now < overdue_at:
            look.wake_at(overdue_at)
        return look.now >= overdue_at

    # Who is let in, and what moved

    def _pins_leave_room(self, need: Need) -> bool:
        pinned = sum(r.need.size for r in self._residents.values() if r.pinned_by and r.need.pool == need.pool)
        return pinned + need.size <= self.capacity.of(need.pool)

    def _resident(self, adapter: AdapterRef) -> Resident:
        """Raises ApiError adapter_deleted if it was removed."""
        resident = self._residents.get(adapter.key)
        if resident is None or adapter.engine_id not in resident.owners:
            raise _gone(adapter)
        return resident

    def _is_open(self, resident: Resident, engine_id: int) -> bool:
        """Whether a request may run now."""
        if not resident.on_device or self._closed.holds(resident, engine_id):
            return False
        return engine_id in self._running or len(self._running) < self.capacity.running

    def _admit(self, resident: Resident, engine_id: int) -> None:
        """Count a request in."""
        resident.running[engine_id] = resident.running.get(engine_id, 0) + 1
        self._running[engine_id] = self._running.pop(engine_id, 0) + 1  # now the last one let in
        resident.last_used = self._clock()

    def _release(self, resident: Resident, engine_id: int) -> None:
        """Count a request out, unless its version was removed meanwhile."""
        if engine_id not in resident.running:
            return
        if resident.running[engine_id] > 1:
            resident.running[engine_id] -= 1
            self._running[engine_id] -= 1
        else:
            self._end_leases(resident, engine_id)
            self._look_again()

    def _end_leases(self, resident: Resident, engine_id: int) -> None:
        del resident.running[engine_id], self._running[engine_id]
        resident.last_used = resident.idle_since = self._clock()

    def _moved(self, read: Resident | None) -> None:
        """A move has ended. read: what it brought to the host."""
        self._newest = read or self._newest
        self._look_again()
        self._drop_least_used()

    def _drop_least_used(self) -> None:
        """Give up host copies until they fit the budget, except those that are wanted or on the move, and the newest if
        it is nowhere else. Those of adapters on the device go first, then the least recently used."""
        held = sum(r.need.host_bytes for r in self._residents.values() if r.on_host)
        if held <= self.capacity.host_bytes:
            return
        kept = {waiter.resident for waiter in self._waiters}
        if self._newest is not None and not self._newest.on_device:
            kept.add(self._newest)
        spare = [r for r in self._residents.values() if r.on_host and not r.is_busy and r not in kept]
        for resident in sorted(spare, key=lambda r: (not r.on_device, r.last_used)):
            if held <= self.capacity.host_bytes:
                return
            held -= resident.need.host_bytes
            self._moves.drop(resident)


def _failed(adapter: AdapterRef, reason: str, retry_s: float) -> ApiError:
    message = f"{adapter.name} could not be loaded: {reason}"
    return ApiError(503, "adapter_unavailable", message, "model", retry_after=max(1, math.ceil(retry_s)))


def _too_late(adapter: AdapterRef, timeout_s: float) -> ApiError:
    message = f"{adapter.name} found no place on the device within {timeout_s:g} s: try again, or enlarge the pool"
    return ApiError(503, "adapter_unavailable", message, "model", retry_after=1)


def _device_full(adapter: AdapterRef) -> ApiError:
    message = f"{adapter.name} does not fit beside the pinned adapters: unpin one, or enlarge the pool (--pool-rows)"
    return ApiError(409, "device_full", message, "model")


def _gone(adapter: AdapterRef) -> ApiError:
    return ApiError(410, "adapter_deleted", f"{adapter.name} was deleted while the request waited", "model")
