"""Owns which adapter is where (disk, host, device), who waits for room, and what is evicted.

The engine only carries out what is decided here, so an admitted request cannot fail to activate its adapter: the room
is promised before the adapter goes there, and nothing is evicted while a request uses it. Invariant: the promised rows
and slots never exceed the pools, nor the adapters with requests the engine's step.

Adapters are served first come first served, except that for `PATIENCE_S` a later one may take what would not be enough
for an earlier one. Then the earlier one holds adapters (they admit no new request) until there is enough for it; once
it is served or gone, they admit requests again. When an adapter's place comes, all who waited for it by then go in, as
far as the engine takes more sequences; while some wait only for that, their adapter is not held for `TURN_S`. A request
whose adapter is on the device and open does not wait unless the engine is full; then keys take turns (`waiting`).

All on one event loop; nothing here blocks. Every change ends in a new pass over the groups of waiters (`_schedule`), at
a cost that depends on what is loaded and waited for, not on what is known.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import count
from typing import Literal

from adapters.ref import AdapterRef
from server.engine.protocol import Engine, ReadFiles
from server.errors import (
    AdapterDeletedError,
    AdapterUnavailableError,
    DeviceFullError,
    EngineUnavailableError,
    ServerError,
)
from server.residency.allocation import (
    NEVER,
    AdmissionHolds,
    SchedulingPass,
    fill,
    is_open,
    surplus_host_copies,
)
from server.residency.state import POOLS, Capacity, Leases, Loaded, Need, Resident, Tier
from server.residency.transfers import TransferEvents, Transfers
from server.residency.waiting import Label, Sequences, Waiter, WaitQueue

RETRY_FAILED_S = 10.0
"""Seconds for which a failed load is answered with its failure before it is tried again."""


async def at_hand(adapter: AdapterRef, load: Callable[[AdapterRef], Awaitable[None]]) -> None:
    """The files of adapters are on this machine."""
    await load(adapter)


class ResidencyScheduler:
    """See the module. clock: monotonic seconds. engine_problem: why the engine does not answer (None: it does)."""

    def __init__(
        self,
        engine: Engine,
        capacity: Capacity,
        events: TransferEvents,
        clock: Callable[[], float] = time.monotonic,
        engine_problem: Callable[[], str | None] = lambda: None,
        read_files: ReadFiles = at_hand,
    ) -> None:
        self.capacity, self._clock, self._engine_problem = capacity, clock, engine_problem
        self.transfers = Transfers(engine, events, clock, self._transfer_settled, read_files)
        self._residents: dict[str, Resident] = {}
        self._leases = Leases(capacity.running, clock)
        self._waiters: WaitQueue[Resident] = WaitQueue()
        self._sequences = Sequences(capacity.sequences)
        self._numbers = count()
        self._loaded = Loaded()
        self._holds = AdmissionHolds()
        self._newest: Resident | None = None
        self._timer: asyncio.TimerHandle | None = None

    # What is known

    def add(self, adapter: AdapterRef, need: Need) -> None:
        """Make a version known. Nothing is loaded."""
        resident = self._residents.get(adapter.key)
        if resident is None:
            resident = self._residents[adapter.key] = Resident(need, adapter.key, loaded=self._loaded)
        resident.owners[adapter.engine_id] = adapter

    async def remove(self, adapter: AdapterRef) -> None:
        """Remove a version and free what only it held. Its waiters and leases end."""
        resident = self._residents[adapter.key]
        del resident.owners[adapter.engine_id]
        resident.removals += 1
        resident.pinned_by -= {adapter.engine_id}
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
                self._loaded.moved(adapter.key)
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
        """Requests of a version that wait, for the device or for a free sequence."""
        return self._waiters.requests(adapter.engine_id)

    def base_waiting(self) -> int:
        """Requests without an adapter that wait for a free sequence (from any thread)."""
        return len(self._sequences.base)

    def resident(self, key: str) -> Resident | None:
        """The content of a key; None if no version has it."""
        return self._residents.get(key)

    @property
    def loaded(self) -> Loaded:
        """What is on the host or the device, or moves."""
        return self._loaded

    def residents(self) -> dict[str, Resident]:
        """Every content by its key (a copy: as long as what is known)."""
        return dict(self._residents)

    @property
    def rows_used(self) -> int:
        """Rows that are promised (from any thread)."""
        return self._loaded.holding["rows"].total

    # What a caller waits for

    async def load(self, adapter: AdapterRef) -> None:
        """Bring a version to the host. Raises AdapterUnavailableError if it cannot be read."""
        await self._wait(adapter, "host")

    @asynccontextmanager
    async def lease(
        self, adapter: AdapterRef, timeout_s: float, joins: bool = False, label: Label = None
    ) -> AsyncIterator[None]:
        """Hold a version on the device, and a sequence of the engine, for one request of a key. It waits at most
        `timeout_s` seconds for its adapter, and then for as long as the engine is full. joins: the caller holds a lease
        of the same version, so this one does not wait for adapters that others wait for.

        Raises AdapterUnavailableError (it cannot be loaded, or not in time), DeviceFullError (pins leave no room), or
        EngineUnavailableError (not in time, since the engine does not answer).
        """
        resident, engine_id = self._resident(adapter), adapter.engine_id
        may_join = joins and engine_id in resident.running
        if self._sequences.is_free_for(label) and (may_join or is_open(resident, engine_id, self._leases, self._holds)):
            self._sequences.take(label)
            self._leases.admit(resident, engine_id)
        else:
            await self._wait(adapter, "lease", label, timeout_s)
        try:
            yield
        finally:
            self._release(resident, engine_id, label)

    def base_lease(self, label: Label = None) -> AbstractAsyncContextManager[None]:
        """Hold a sequence of the engine for one request of a key that has no adapter."""
        return self._sequences.lease(label, next(self._numbers), self._schedule)

    async def pin(self, adapter: AdapterRef) -> None:
        """Keep a version on the device. Raises DeviceFullError if other pins leave no room for it."""
        resident = self._resident(adapter)
        if not resident.pinned_by and not self._pins_leave_room(resident.need):
            raise _device_full(adapter, resident)
        resident.pinned_by |= {adapter.engine_id}
        try:
            await self._wait(adapter, "device")
        except BaseException:
            self.unpin(adapter)
            raise

    def unpin(self, adapter: AdapterRef) -> None:
        resident = self._residents.get(adapter.key)
        if resident is not None:
            resident.pinned_by -= {adapter.engine_id}
            self._schedule()

    def fail_waiters(self, adapter: AdapterRef, error: ServerError) -> None:
        """End every wait for a version with `error`."""
        for waiter in self._waiters.of(adapter.engine_id):
            self._waiters.answer(waiter, error)
        self._schedule()

    async def _wait(
        self,
        adapter: AdapterRef,
        wants: Literal["host", "device", "lease"],
        label: Label = None,
        timeout_s: float | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        waiter = Waiter(self._resident(adapter), adapter, wants, self._clock(), next(self._numbers), ready, label)
        self._waiters.add(waiter)
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._time_out, waiter, timeout_s)
        try:
            self._schedule()
            await ready
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._schedule()
            elif waiter.is_granted:
                self._release(waiter.resident, adapter.engine_id, label)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _time_out(self, waiter: Waiter[Resident], timeout_s: float) -> None:
        """End a wait, unless nothing but the full engine is in the way."""
        if waiter.ready.done():
            return
        group = self._waiters.group(waiter.adapter.engine_id)
        if group is not None and group.turn_began is not None:
            asyncio.get_running_loop().call_later(timeout_s, self._time_out, waiter, timeout_s)
            return
        self._waiters.answer(waiter, _timed_out(waiter, timeout_s, self._engine_problem()))
        self._schedule()

    def _schedule(self) -> None:
        """Run a pass over the waiters; the next one follows an event, or the passing of time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiters:
            self._holds = AdmissionHolds()
            fill([], self._leases, self._waiters, self._sequences, self._holds)
            return
        now = self._clock()
        current = SchedulingPass(
            self.capacity, self._loaded, self._leases, self._waiters, self._sequences, self.transfers, self._holds, now
        )
        self._holds = current.holds
        current.run(partial(_refusal, engine_problem=self._engine_problem))
        fill(current.may_run, self._leases, self._waiters, self._sequences, self._holds)
        if not self._waiters:
            self._holds = AdmissionHolds()
        elif current.wake_at < NEVER:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, current.wake_at - now) + 0.001, self._schedule)

    def _resident(self, adapter: AdapterRef) -> Resident:
        """Raises AdapterDeletedError if it was removed."""
        resident = self._residents.get(adapter.key)
        if resident is None or adapter.engine_id not in resident.owners:
            raise _deleted(adapter)
        return resident

    def _pins_leave_room(self, need: Need) -> bool:
        return self._loaded.pinned[need.pool].total + need.size <= self.capacity.of(need.pool)

    def _release(self, resident: Resident, engine_id: int, label: Label) -> None:
        self._sequences.give_back(label)
        if self._leases.release(resident, engine_id) or self.capacity.sequences is not None:
            self._schedule()

    def _transfer_settled(self, read: Resident | None) -> None:
        """A move has ended. read: what it brought to the host, which stays there if it is nowhere else."""
        self._newest = read or self._newest
        self._schedule()
        if self._loaded.on_host.total <= self.capacity.host_bytes:
            return
        kept = self._waiters.residents()
        if self._newest is not None and not self._newest.on_device:
            kept.add(self._newest)
        for resident in surplus_host_copies(self._loaded, self.capacity.host_bytes, kept):
            self.transfers.drop(resident)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the promises fit, everything that runs is on the device, and nothing waits for
        what will never come."""
        residents = list(self._residents.values())
        self._loaded.check_integrity(residents)
        _check_promises(residents, self.capacity)
        self._leases.check_integrity(residents)
        self._sequences.check_integrity()
        assert self._waiters or (self._holds == AdmissionHolds() and self._timer is None), "held without a waiter"
        self._waiters.check_integrity()
        is_waking = len(self._loaded.unsettled) or self._sequences.used or self._timer is not None
        assert not self._waiters.pending() or is_waking, "nothing will end the waits"


def _check_promises(residents: list[Resident], capacity: Capacity) -> None:
    for pool in POOLS:
        mine = [r for r in residents if r.need.pool == pool]
        assert sum(r.need.size for r in mine if r.holds_room) <= capacity.of(pool), f"too many {pool} promised"
        assert sum(r.need.size for r in mine if r.pinned_by) <= capacity.of(pool), f"too many {pool} pinned"
    assert all(r.holds_room for r in residents if r.on_device), "on the device without room"
    assert all(r.on_device for r in residents if r.running), "a request runs without its adapter"
    assert all(r.owners or r.removals for r in residents), "a content without a version is kept"


def _refusal(
    waiter: Waiter[Resident], now: float, can_ever_fit: bool, engine_problem: Callable[[], str | None]
) -> ServerError | None:
    """Why waiting is useless: the load just failed, or pins leave no room. None if it is not."""
    failed = waiter.resident.failed
    if failed is not None and now < failed.at + RETRY_FAILED_S:
        if (problem := engine_problem()) is not None:
            return _engine_unavailable(waiter.adapter, problem)
        if not failed.is_of_engine:
            return _load_failed(waiter.adapter, failed.reason, failed.at + RETRY_FAILED_S - now)
    if waiter.wants != "host" and not can_ever_fit:
        return _device_full(waiter.adapter, waiter.resident)
    return None


def _timed_out(waiter: Waiter[Resident], timeout_s: float, engine_problem: str | None) -> ServerError:
    """Says what the wait was for when it ended."""
    if engine_problem is not None:
        return _engine_unavailable(waiter.adapter, engine_problem)
    limit, resident = f"within {timeout_s:g} s", waiter.resident
    if resident.is_usable:
        reason = f"found no slot in the engine's step {limit}; retry, or let more adapters run at once (--max-loras)"
    elif resident.on_host:
        reason = f"found no room on the device {limit}; retry, or {_enlarge(resident)}"
    else:
        reason = f"was not read from disk {limit}; retry"
    return AdapterUnavailableError(f"{waiter.adapter.name} {reason}", retry_after_s=1)


def _load_failed(adapter: AdapterRef, reason: str, retry_s: float) -> AdapterUnavailableError:
    message = f"{adapter.name} could not be loaded: {reason}"
    return AdapterUnavailableError(message, retry_after_s=max(1, math.ceil(retry_s)))


def _device_full(adapter: AdapterRef, resident: Resident) -> DeviceFullError:
    message = f"{adapter.name} does not fit beside the pinned adapters; unpin one, or {_enlarge(resident)}"
    return DeviceFullError(message)


def _engine_unavailable(adapter: AdapterRef, problem: str) -> EngineUnavailableError:
    return EngineUnavailableError(f"{adapter.name} could not be loaded: {problem}", retry_after_s=5)


def _enlarge(resident: Resident) -> str:
    """How to get more room of the kind that a resident takes."""
    return "serve more PEFT LoRA slots (--max-loras)" if resident.need.lora_slots else "enlarge the pool (--pool-rows)"


def _deleted(adapter: AdapterRef) -> AdapterDeletedError:
    return AdapterDeletedError(f"{adapter.name} was deleted while the request waited")
