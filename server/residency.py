"""Owns which adapter is where (disk, host, device), who waits for a place, and who has to leave.

The engine only carries out what is decided here, so what is admitted cannot fail to activate: its rows are promised
before it is placed, and nobody's rows are taken while a request uses them. Invariants: the promised rows never exceed
the pool; waiting requests are served in the order they came, except that for `PATIENCE_S` a later one may take rows
that would not be enough for an earlier one. Then the earlier one closes running adapters to new requests until it fits.

All on one event loop; nothing here blocks.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from server.engine import AdapterLoadError, Engine, EngineAdapter
from server.errors import ApiError
from server.schemas import Residency as Tier

Loaded = Literal["host", "device"]
PATIENCE_S = 0.5
"""How long a waiting request lets later ones pass."""
GRACE_S = 0.1
"""How long an adapter keeps its rows after its last request: the engine may still be told to abort that one."""
RETRY_FAILED_S = 10.0
"""How long a failed load is answered with its failure before it is tried again."""


@dataclass(frozen=True)
class Capacity:
    """What there is: rows of the device pool, slots for PEFT LoRA, bytes for host copies, and how many adapters
    may take part in one engine step."""

    rows: int
    lora_slots: int
    host_bytes: int
    running: int


@dataclass(frozen=True)
class Need:
    """What one adapter takes: rows on the device (PERFT) or a slot (PEFT LoRA), bytes on the host."""

    rows: int
    lora_slots: int
    host_bytes: int


class Events(Protocol):
    """Who is told of loads and evictions (the metrics)."""

    def load_finished(self, tier: Loaded, seconds: float, result: Literal["ok", "failed"]) -> None: ...

    def evicted(self, tier: Loaded) -> None: ...


@dataclass(eq=False)
class Resident:
    """One content and where it is. `owners`: the versions that share it. `running`: requests by engine id."""

    need: Need
    owners: dict[int, EngineAdapter] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    on_host: bool = False
    on_device: bool = False
    moving: bool = False
    closing: bool = False
    pins: int = 0
    last_used: float = 0.0
    idle_since: float = float("-inf")
    failed: tuple[str, float] | None = None

    @property
    def tier(self) -> Tier:
        return "device" if self.on_device else "host" if self.on_host else "disk"

    @property
    def any_owner(self) -> EngineAdapter:
        return next(iter(self.owners.values()))


@dataclass(eq=False)
class Waiter:
    """A request, a pin or an activation that waits until `resident` is on the `tier` it asks for."""

    resident: Resident
    engine_id: int
    tier: Tier
    since: float
    ready: asyncio.Future[None]


class ResidencyPlan:
    """See the module."""

    def __init__(
        self, engine: Engine, capacity: Capacity, events: Events, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self.capacity, self._events, self._clock = engine, capacity, events, clock
        self._residents: dict[str, Resident] = {}
        self._waiters: list[Waiter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None

    def add(self, adapter: EngineAdapter, need: Need) -> None:
        """Make a version known. Nothing is loaded."""
        self._residents.setdefault(adapter.key, Resident(need)).owners[adapter.engine_id] = adapter

    async def remove(self, adapter: EngineAdapter) -> None:
        """A version is gone: free what only it held. No request of it may be running."""
        resident = self._residents[adapter.key]
        while resident.moving:
            await asyncio.sleep(GRACE_S)
        del resident.owners[adapter.engine_id]
        if not resident.owners:
            await self._free(resident, adapter)
        await self._engine.forget(adapter)
        self._pump()

    async def _free(self, resident: Resident, last_owner: EngineAdapter) -> None:
        """Take a content nobody owns any more off the device and the host; a new owner meanwhile waits for the end."""
        resident.moving = True
        try:
            await asyncio.sleep(max(0.0, resident.idle_since + GRACE_S - self._clock()))
            if resident.on_device:
                await self._engine.evict(last_owner)
            if resident.on_host:
                await self._engine.drop(last_owner)
            resident.on_device = resident.on_host = False
        finally:
            resident.moving = False
        if not resident.owners:
            del self._residents[last_owner.key]

    def tier(self, adapter: EngineAdapter) -> Tier:
        return self._residents[adapter.key].tier

    def failure(self, adapter: EngineAdapter) -> str | None:
        """Why the last load failed, None if it did not."""
        failed = self._residents[adapter.key].failed
        return None if failed is None else failed[0]

    def waiting(self, adapter: EngineAdapter) -> int:
        """Requests of a version that wait for the device."""
        return sum(w.engine_id == adapter.engine_id and w.tier == "device" for w in self._waiters)

    @property
    def rows_used(self) -> int:
        return sum(r.need.rows for r in self._residents.values() if r.on_device)

    async def load(self, adapter: EngineAdapter) -> None:
        """Bring a version to the host. Raises ApiError adapter_unavailable if it cannot be read."""
        await self._wait(adapter, "host")

    @asynccontextmanager
    async def lease(self, adapter: EngineAdapter, timeout_s: float) -> AsyncIterator[None]:
        """Hold a version on the device for one request; waits for its turn.

        Raises ApiError: adapter_unavailable (it cannot be loaded, or not in time), device_full (pins leave no room).
        """
        resident = self._residents[adapter.key]
        if not self._admit(resident, adapter.engine_id):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wait(adapter, "device")
            except TimeoutError:
                raise ApiError(
                    503,
                    "adapter_unavailable",
                    f"{adapter.name} found no place on the device within {timeout_s:g} s: try again, or enlarge the pool",
                    "model",
                    retry_after=1,
                ) from None
        try:
            yield
        finally:
            self._release(resident, adapter.engine_id)

    async def pin(self, adapter: EngineAdapter) -> None:
        """Keep a version on the device. Raises ApiError device_full if other pins leave no room for it."""
        resident = self._residents[adapter.key]
        pinned = self._sum(r.need for r in self._residents.values() if r.pins)
        if not resident.pins and not self._within(self._sum([pinned, resident.need])):
            raise self._device_full(adapter)
        resident.pins += 1
        try:
            if not resident.on_device:
                await self._wait(adapter, "device")
                self._release(resident, adapter.engine_id)
        except BaseException:
            resident.pins -= 1
            raise

    def unpin(self, adapter: EngineAdapter) -> None:
        self._residents[adapter.key].pins -= 1
        self._pump()

    def fail_waiters(self, adapter: EngineAdapter, error: ApiError) -> None:
        """End every wait for a version with `error`."""
        for waiter in [w for w in self._waiters if w.engine_id == adapter.engine_id and not w.ready.done()]:
            waiter.ready.set_exception(error)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the promises fit and everything that runs is on the device."""
        promised = self._sum(r.need for r in self._residents.values() if self._takes_rows(r))
        assert self._within(promised), promised
        assert all(r.on_device for r in self._residents.values() if r.running), "a request runs without rows"

    async def _wait(self, adapter: EngineAdapter, tier: Tier) -> None:
        resident = self._residents[adapter.key]
        if tier == "host" and (resident.on_host or resident.on_device):
            return
        waiter = Waiter(resident, adapter.engine_id, tier, self._clock(), asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            self._pump()
            await waiter.ready
        except asyncio.CancelledError:
            if waiter.ready.done() and not waiter.ready.cancelled() and waiter.ready.exception() is None:
                if tier == "device":
                    self._release(resident, adapter.engine_id)
            raise
        finally:
            self._waiters.remove(waiter)
            for other in self._residents.values():
                other.closing = False
            self._pump()

    def _admit(self, resident: Resident, engine_id: int) -> bool:
        """Count a request in, if its adapter is on the device, open to it, and the step has a place for it."""
        running = {number for other in self._residents.values() for number in other.running}
        if not resident.on_device or resident.closing or (len(running | {engine_id}) > self.capacity.running):
            return False
        resident.running[engine_id] = resident.running.get(engine_id, 0) + 1
        resident.last_used = self._clock()
        return True

    def _release(self, resident: Resident, engine_id: int) -> None:
        resident.running[engine_id] -= 1
        if not resident.running[engine_id]:
            del resident.running[engine_id]
        resident.last_used = resident.idle_since = self._clock()
        if self._waiters:
            self._pump_in(GRACE_S)
            self._pump()

    def _pump(self) -> None:
        """Move every waiter on as far as it can go, in the order they came."""
        strict = False
        for waiter in list(self._waiters):
            resident = waiter.resident
            if waiter.ready.done():
                continue
            if (waiter.tier == "device" and self._admit(resident, waiter.engine_id)) or (
                waiter.tier == "host" and (resident.on_host or resident.on_device)
            ):
                waiter.ready.set_result(None)
            elif resident.moving or resident.on_device:
                continue
            elif not resident.on_host:
                self._read(resident, waiter)
            elif not strict:
                strict = not self._place(resident, waiter)

    def _read(self, resident: Resident, waiter: Waiter) -> None:
        """Start disk to host, or fail the waiter if that just failed."""
        if resident.failed is not None and self._clock() - resident.failed[1] < RETRY_FAILED_S:
            reason = resident.failed[0]
            name = resident.owners[waiter.engine_id].name
            waiter.ready.set_exception(
                ApiError(503, "adapter_unavailable", f"{name} could not be loaded: {reason}", "model", retry_after=10)
            )
            return
        self._start(resident, "host", self._engine.prepare(resident.any_owner))

    def _place(self, resident: Resident, waiter: Waiter) -> bool:
        """Start host to device if room can be made. False once the waiter's patience is over: nobody passes it."""
        leaving = self._leaving_for(resident)
        if leaving is not None:
            for other in leaving:
                other.on_device = other.closing = False
                self._events.evicted("device")
            for other in self._residents.values():
                other.closing = False
            evict = [other.any_owner for other in leaving]
            self._start(resident, "device", self._engine.place(resident.any_owner, evict))
            return True
        fixed = self._sum(r.need for r in self._residents.values() if r.pins and r is not resident)
        if not self._within(self._sum([fixed, resident.need])):
            waiter.ready.set_exception(self._device_full(resident.any_owner))
            return True
        waited = self._clock() - waiter.since
        if waited < PATIENCE_S:
            self._pump_in(PATIENCE_S - waited)
            return True
        self._close_for(resident)
        self._pump_in(GRACE_S)
        return False

    def _leaving_for(self, resident: Resident) -> list[Resident] | None:
        """The idle adapters, least recently used first, whose rows have to go so that `resident` fits; None: not yet."""
        needed = self._sum([resident.need, *(r.need for r in self._residents.values() if self._takes_rows(r))])
        leaving: list[Resident] = []
        for other in sorted(self._residents.values(), key=lambda r: r.last_used):
            if self._within(needed):
                break
            idle = other.on_device and not other.running and not other.pins and not other.moving
            if idle and self._clock() - other.idle_since >= GRACE_S and self._helps(other, resident):
                leaving.append(other)
                needed = self._sum([needed], minus=other.need)
        return leaving if self._within(needed) else None

    def _close_for(self, resident: Resident) -> None:
        """Close adapters to new requests, least recently used first, until `resident` fits once they are idle."""
        needed = self._sum([resident.need, *(r.need for r in self._residents.values() if self._takes_rows(r))])
        for other in sorted(self._residents.values(), key=lambda r: r.last_used):
            if self._within(needed):
                return
            if other.on_device and not other.pins and not other.moving and self._helps(other, resident):
                other.closing = True
                needed = self._sum([needed], minus=other.need)

    def _start(self, resident: Resident, tier: Loaded, move: Coroutine[Any, Any, None]) -> None:
        resident.moving = True
        task = asyncio.get_running_loop().create_task(self._move(resident, tier, move))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _move(self, resident: Resident, tier: Loaded, move: Coroutine[Any, Any, None]) -> None:
        """Carry one move out and tell whoever waits for it."""
        started = self._clock()
        try:
            await move
        except Exception as error:
            reason = (
                str(error) if isinstance(error, AdapterLoadError) else f"the engine failed ({type(error).__name__})"
            )
            resident.failed = (reason, self._clock())
            self._fail_all(resident, reason)
        else:
            resident.failed = None
            if tier == "host":
                resident.on_host = True
            else:
                resident.on_device, resident.idle_since, resident.last_used = True, float("-inf"), self._clock()
        finally:
            resident.moving = False
        self._events.load_finished(tier, self._clock() - started, "ok" if resident.failed is None else "failed")
        if tier == "host":
            await self._drop_least_used(resident)
        self._pump()

    async def _drop_least_used(self, newest: Resident) -> None:
        """Give up host copies, least recently used first, until they fit the budget; the newest stays."""
        held = sum(r.need.host_bytes for r in self._residents.values() if r.on_host)
        for other in sorted(self._residents.values(), key=lambda r: (not r.on_device, r.last_used)):
            if held <= self.capacity.host_bytes:
                return
            wanted = other is newest or other.moving or any(w.resident is other for w in self._waiters)
            if other.on_host and not wanted:
                other.on_host = False
                held -= other.need.host_bytes
                self._events.evicted("host")
                await self._engine.drop(other.any_owner)

    def _fail_all(self, resident: Resident, reason: str) -> None:
        for waiter in self._waiters:
            if waiter.resident is resident and not waiter.ready.done():
                name = resident.owners[waiter.engine_id].name
                message = f"{name} could not be loaded: {reason}"
                waiter.ready.set_exception(ApiError(503, "adapter_unavailable", message, "model", retry_after=10))

    def _device_full(self, adapter: EngineAdapter) -> ApiError:
        return ApiError(
            409,
            "device_full",
            f"{adapter.name} does not fit beside the pinned adapters: unpin one, or enlarge the pool (--pool-rows)",
            "model",
        )

    def _pump_in(self, seconds: float) -> None:
        """Look again later (the soonest asked for counts)."""
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds + 0.001
        if self._wake is not None and not self._wake.cancelled() and loop.time() < self._wake.when() <= when:
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake = loop.call_at(when, self._pump)

    @staticmethod
    def _takes_rows(resident: Resident) -> bool:
        """Whether its rows are promised: it is on the device or on its way there."""
        return resident.on_device or (resident.on_host and resident.moving)

    @staticmethod
    def _helps(other: Resident, resident: Resident) -> bool:
        """Whether `other` leaving frees what `resident` needs."""
        return bool((other.need.rows and resident.need.rows) or (other.need.lora_slots and resident.need.lora_slots))

    def _within(self, need: Need) -> bool:
        return need.rows <= self.capacity.rows and need.lora_slots <= self.capacity.lora_slots

    @staticmethod
    def _sum(needs: Any, minus: Need = Need(0, 0, 0)) -> Need:
        listed: Sequence[Need] = list(needs)
        return Need(
            sum(n.rows for n in listed) - minus.rows,
            sum(n.lora_slots for n in listed) - minus.lora_slots,
            sum(n.host_bytes for n in listed) - minus.host_bytes,
        )
