"""Owns which adapter is where (disk, host, device), who waits for room, and what is evicted.

The engine only carries out what is decided here, so an admitted request cannot fail to activate its adapter: the room
is promised before the adapter goes there, and nothing is evicted while a request uses it. Invariant: the promised rows
and slots never exceed the pools, nor the adapters with requests the engine's step.

Waiters are served first come first served, except that for `PATIENCE_S` a later one may take what would not be enough
for an earlier one. Then the earlier one holds adapters (they admit no new request) until there is enough for it; once
it is served or gone, they admit requests again. A request whose adapter is on the device and open does not wait.

All on one event loop; nothing here blocks. Every change ends in a new pass over the waiters (`_schedule`).
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

from adapters.ref import AdapterRef
from server.engine.protocol import Engine
from server.errors import AdapterDeletedError, AdapterUnavailableError, DeviceFullError, ServerError
from server.residency.allocation import NEVER, AdmissionHolds, SchedulingPass, is_open, surplus_host_copies
from server.residency.state import POOLS, Capacity, Leases, Need, Resident, Tier, Waiter, WaitQueue
from server.residency.transfers import TransferEvents, Transfers

RETRY_FAILED_S = 10.0
"""Seconds for which a failed load is answered with its failure before it is tried again."""


class ResidencyScheduler:
    """See the module. clock: monotonic seconds."""

    def __init__(
        self, engine: Engine, capacity: Capacity, events: TransferEvents, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.capacity, self._clock = capacity, clock
        self.transfers = Transfers(engine, events, clock, self._transfer_settled)
        self._residents: dict[str, Resident] = {}
        self._leases = Leases(capacity.running, clock)
        self._waiters = WaitQueue()
        self._holds = AdmissionHolds()
        self._newest: Resident | None = None
        self._timer: asyncio.TimerHandle | None = None

    # What is known

    def add(self, adapter: AdapterRef, need: Need) -> None:
        """Make a version known. Nothing is loaded."""
        self._residents.setdefault(adapter.key, Resident(need)).owners[adapter.engine_id] = adapter

    async def remove(self, adapter: AdapterRef) -> None:
        """Remove a version and free what only it held. Its waiters and leases end."""
        resident = self._residents[adapter.key]
        del resident.owners[adapter.engine_id]
        resident.removals += 1
        resident.pinned_by.discard(adapter.engine_id)
        if adapter.engine_id in resident.running:
            self._leases.end(resident, adapter.engine_id)
        self.fail_waiters(adapter, _deleted(adapter))
        await asyncio.shield(self.transfers.spawn(self._remove(resident, adapter)))

    async def _remove(self, resident: Resident, adapter: AdapterRef) -> None:
        while resident.move is not None:
            await resident.settled.wait()
        try:
            await self.transfers.free(resident, adapter)
        finally:
            resident.removals -= 1
            if not resident.owners and not resident.removals:
                del self._residents[adapter.key]
            self._schedule()
        await self.transfers.forget(adapter)

    def tier(self, adapter: AdapterRef) -> Tier:
        resident = self._residents.get(adapter.key)
        return "disk" if resident is None else resident.tier

    def failure(self, adapter: AdapterRef) -> str | None:
        """Why the last load failed; None if it did not."""
        resident = self._residents.get(adapter.key)
        return None if resident is None or resident.failed is None else resident.failed.reason

    def requests_waiting(self, adapter: AdapterRef) -> int:
        """Requests of a version that wait for the device."""
        return self._waiters.requests(adapter.engine_id)

    def residents(self) -> dict[str, Resident]:
        """Every content by its key (a copy)."""
        return dict(self._residents)

    @property
    def rows_used(self) -> int:
        """Rows that are promised (from any thread)."""
        return sum(r.need.rows for r in list(self._residents.values()) if r.holds_room)

    # What a caller waits for

    async def load(self, adapter: AdapterRef) -> None:
        """Bring a version to the host. Raises AdapterUnavailableError if it cannot be read."""
        await self._wait(adapter, "host")

    @asynccontextmanager
    async def lease(self, adapter: AdapterRef, timeout_s: float, joins: bool = False) -> AsyncIterator[None]:
        """Hold a version on the device for one request; waits at most `timeout_s` seconds. joins: the caller holds a
        lease of the same version, so this one is granted at once (waiting behind those that wait for the first one
        would never end).

        Raises AdapterUnavailableError (it cannot be loaded, or not in time) or DeviceFullError (pins leave no room).
        """
        resident = self._resident(adapter)
        engine_id = adapter.engine_id
        if (joins and engine_id in resident.running) or is_open(resident, engine_id, self._leases, self._holds):
            self._leases.admit(resident, engine_id)
        else:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wait(adapter, "lease")
            except TimeoutError:
                raise _timed_out(adapter, resident, timeout_s) from None
        try:
            yield
        finally:
            self._release(resident, engine_id)

    async def pin(self, adapter: AdapterRef) -> None:
        """Keep a version on the device. Raises DeviceFullError if other pins leave no room for it."""
        resident = self._resident(adapter)
        if not resident.pinned_by and not self._pins_leave_room(resident.need):
            raise _device_full(adapter, resident)
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
            self._schedule()

    def fail_waiters(self, adapter: AdapterRef, error: ServerError) -> None:
        """End every wait for a version with `error`."""
        for waiter in self._waiters.of(adapter.engine_id):
            self._waiters.answer(waiter, error)
        self._schedule()

    async def _wait(self, adapter: AdapterRef, wants: Literal["host", "device", "lease"]) -> None:
        ready = asyncio.get_running_loop().create_future()
        waiter = Waiter(self._resident(adapter), adapter, wants, self._clock(), ready)
        self._waiters.add(waiter)
        try:
            self._schedule()
            await ready
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._schedule()
            elif waiter.is_granted:
                self._release(waiter.resident, adapter.engine_id)
            raise

    def _schedule(self) -> None:
        """Run a pass over the waiters; the next one follows an event, or the passing of time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiters:
            self._holds = AdmissionHolds()
            return
        now, residents = self._clock(), self._residents.values()
        current = SchedulingPass(
            self.capacity, residents, self._leases, self._waiters, self.transfers, self._holds, now
        )
        self._holds = current.holds
        current.run(_refusal)
        if current.wake_at < NEVER:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, current.wake_at - now) + 0.001, self._schedule)

    def _resident(self, adapter: AdapterRef) -> Resident:
        """Raises AdapterDeletedError if it was removed."""
        resident = self._residents.get(adapter.key)
        if resident is None or adapter.engine_id not in resident.owners:
            raise _deleted(adapter)
        return resident

    def _pins_leave_room(self, need: Need) -> bool:
        pinned = sum(r.need.size for r in self._residents.values() if r.pinned_by and r.need.pool == need.pool)
        return pinned + need.size <= self.capacity.of(need.pool)

    def _release(self, resident: Resident, engine_id: int) -> None:
        if self._leases.release(resident, engine_id):
            self._schedule()

    def _transfer_settled(self, read: Resident | None) -> None:
        """A move has ended. read: what it brought to the host, which stays there if it is nowhere else."""
        self._newest = read or self._newest
        self._schedule()
        kept = self._waiters.residents()
        if self._newest is not None and not self._newest.on_device:
            kept.add(self._newest)
        for resident in surplus_host_copies(self._residents.values(), self.capacity.host_bytes, kept):
            self.transfers.drop(resident)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the promises fit, everything that runs is on the device, and nothing waits for
        what will never come."""
        residents = self._residents.values()
        for pool in POOLS:
            mine = [r for r in residents if r.need.pool == pool]
            assert sum(r.need.size for r in mine if r.holds_room) <= self.capacity.of(pool), f"too many {pool} promised"
            assert sum(r.need.size for r in mine if r.pinned_by) <= self.capacity.of(pool), f"too many {pool} pinned"
        assert all(r.holds_room for r in residents if r.on_device), "on the device without room"
        assert all(r.on_device for r in residents if r.running), "a request runs without its adapter"
        assert all(r.owners or r.removals for r in residents), "a content without a version is kept"
        self._leases.check_integrity(residents)
        assert self._waiters or (self._holds == AdmissionHolds() and self._timer is None), "held without a waiter"
        self._waiters.check_integrity()
        is_moving = any(r.is_busy or r.is_lost for r in residents)
        is_waking = is_moving or self._leases.running or self._timer is not None
        assert not self._waiters.pending() or is_waking, "nothing will end the waits"


def _refusal(waiter: Waiter, now: float, can_ever_fit: bool) -> ServerError | None:
    """Why waiting is useless: the load just failed, or pins leave no room. None if it is not."""
    failed = waiter.resident.failed
    if failed is not None and now < failed.at + RETRY_FAILED_S:
        return _load_failed(waiter.adapter, failed.reason, failed.at + RETRY_FAILED_S - now)
    if waiter.wants != "host" and not can_ever_fit:
        return _device_full(waiter.adapter, waiter.resident)
    return None


def _load_failed(adapter: AdapterRef, reason: str, retry_s: float) -> AdapterUnavailableError:
    message = f"{adapter.name} could not be loaded: {reason}"
    return AdapterUnavailableError(message, retry_after_s=max(1, math.ceil(retry_s)))


def _timed_out(adapter: AdapterRef, resident: Resident, timeout_s: float) -> AdapterUnavailableError:
    """Says what the wait was for when it ended."""
    limit = f"within {timeout_s:g} s"
    if resident.on_device and not resident.is_lost:
        reason = f"found no slot in the engine's step {limit}; retry, or let more adapters run at once (--max-loras)"
    elif resident.on_host:
        reason = f"found no room on the device {limit}; retry, or {_enlarge(resident)}"
    else:
        reason = f"was not read from disk {limit}; retry"
    return AdapterUnavailableError(f"{adapter.name} {reason}", retry_after_s=1)


def _device_full(adapter: AdapterRef, resident: Resident) -> DeviceFullError:
    message = f"{adapter.name} does not fit beside the pinned adapters; unpin one, or {_enlarge(resident)}"
    return DeviceFullError(message)


def _enlarge(resident: Resident) -> str:
    """How to get more room of the kind that a resident takes."""
    return "serve more PEFT LoRA slots (--max-loras)" if resident.need.lora_slots else "enlarge the pool (--pool-rows)"


def _deleted(adapter: AdapterRef) -> AdapterDeletedError:
    return AdapterDeletedError(f"{adapter.name} was deleted while the request waited")
