"""Owns the state of residency: each content's versions, tiers and current move; the waiters; the running requests.

Invariant: a content holds its room on the device (rows, or a LoRA slot) from the start of its move there until the
engine was asked to free it; what can be used there (`on_device`) holds its room.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapters.ref import AdapterRef

GRACE_S = 0.1
"""Seconds that a content stays on the device after its last request: the engine may still be aborting that one."""

Tier = Literal["device", "host", "disk"]
Pool = Literal["rows", "lora_slots"]
POOLS: tuple[Pool, ...] = ("rows", "lora_slots")
Move = Literal["reading", "placing", "evicting", "dropping", "freeing", "repairing"]
"""evicting: its room is promised to another content already. freeing: no version has the content any more."""


@dataclass(frozen=True)
class Capacity:
    """What there is: rows of the device pool, slots for PEFT LoRA, bytes for host copies, and how many adapters can
    take part in one engine step (`running`)."""

    rows: int
    lora_slots: int
    host_bytes: int
    running: int

    def of(self, pool: Pool) -> int:
        return self.rows if pool == "rows" else self.lora_slots


@dataclass(frozen=True)
class Need:
    """What one adapter takes: rows on the device (PERFT) or a slot (PEFT LoRA), never both; bytes on the host."""

    rows: int
    lora_slots: int
    host_bytes: int

    def __post_init__(self) -> None:
        assert not (self.rows and self.lora_slots), self

    @property
    def pool(self) -> Pool:
        return "lora_slots" if self.lora_slots else "rows"

    @property
    def size(self) -> int:
        """Rows or slots, whichever it takes."""
        return self.lora_slots or self.rows


class Failure(NamedTuple):
    """Why a move failed, and when (monotonic seconds)."""

    reason: str
    at: float


@dataclass(eq=False)
class Resident:
    """One content. Versions with the same content share it.

    owners: the versions, by engine id. running: leases by engine id. pinned_by: engine ids. removals: versions that are
    being removed. is_lost: the engine lost what it should hold on the device. moves: how many moves began so far.
    last_used and idle_since: monotonic seconds.
    """

    need: Need
    owners: dict[int, AdapterRef] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    pinned_by: set[int] = field(default_factory=set)
    on_host: bool = False
    on_device: bool = False
    is_lost: bool = False
    holds_room: bool = False
    move: Move | None = None
    moves: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    removals: int = 0
    last_used: float = float("-inf")
    idle_since: float = float("-inf")
    failed: Failure | None = None

    @property
    def tier(self) -> Tier:
        return "device" if self.on_device else "host" if self.on_host else "disk"

    @property
    def any_owner(self) -> AdapterRef:
        return next(iter(self.owners.values()))

    @property
    def is_busy(self) -> bool:
        """Whether the engine is moving it, or about to: no other move may start."""
        return self.move is not None or self.removals > 0

    @property
    def is_evictable(self) -> bool:
        """Whether it can be evicted once no request uses it."""
        return self.on_device and not self.is_lost and not self.pinned_by and not self.is_busy

    def start(self, move: Move) -> None:
        assert self.move is None, (self.move, move)
        self.move = move
        self.moves += 1
        self.settled.clear()

    def settle(self) -> None:
        """The move has ended."""
        self.move = None
        self.settled.set()


@dataclass(eq=False)
class Waiter:
    """What waits for an adapter: an activation (for the host), a pin (for the device), a request (for a lease).

    since: monotonic seconds. ready: ends the wait. is_granted: the lease is counted.
    """

    resident: Resident
    adapter: AdapterRef
    wants: Literal["host", "device", "lease"]
    since: float
    ready: asyncio.Future[None]
    is_granted: bool = False


class WaitQueue:
    """The waiters, in the order they came; `requests` counts exactly the requests among them."""

    def __init__(self) -> None:
        self._waiters: dict[Waiter, None] = {}
        self._requests: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiters)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._waiters

    def pending(self) -> list[Waiter]:
        """Those still to be answered, in the order they came (a cancelled one leaves the queue a moment later)."""
        return [waiter for waiter in self._waiters if not waiter.ready.done()]

    def of(self, engine_id: int) -> list[Waiter]:
        """Those that wait for one version."""
        return [waiter for waiter in self._waiters if waiter.adapter.engine_id == engine_id]

    def residents(self) -> set[Resident]:
        """What is waited for."""
        return {waiter.resident for waiter in self._waiters}

    def requests(self, engine_id: int) -> int:
        """How many requests wait for one version."""
        return self._requests[engine_id]

    def add(self, waiter: Waiter) -> None:
        self._waiters[waiter] = None
        if waiter.wants == "lease":
            self._requests[waiter.adapter.engine_id] += 1

    def remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter]
        if waiter.wants == "lease":
            self._requests[waiter.adapter.engine_id] -= 1
            if not self._requests[waiter.adapter.engine_id]:
                del self._requests[waiter.adapter.engine_id]

    def answer(self, waiter: Waiter, error: Exception | None = None) -> None:
        """End a wait; `error` is raised there."""
        self.remove(waiter)
        if waiter.ready.done():
            return
        if error is None:
            waiter.ready.set_result(None)
        else:
            waiter.ready.set_exception(error)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the count of requests is right."""
        assert self._requests == Counter(w.adapter.engine_id for w in self._waiters if w.wants == "lease")


class Leases:
    """The requests that run, by engine id, the id least recently admitted first. total: adapters that one step serves.

    clock: monotonic seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total, self._clock = total, clock
        self.running: dict[int, int] = {}

    def has_slot(self, engine_id: int) -> bool:
        """Whether a request of that id fits into the engine's step."""
        return engine_id in self.running or len(self.running) < self.total

    def admit(self, resident: Resident, engine_id: int) -> None:
        """Count a request in."""
        resident.running[engine_id] = resident.running.get(engine_id, 0) + 1
        self.running[engine_id] = self.running.pop(engine_id, 0) + 1  # now the last one admitted
        resident.last_used = self._clock()

    def release(self, resident: Resident, engine_id: int) -> bool:
        """Count a request out, unless its version was removed meanwhile. True if it was the id's last one."""
        if engine_id not in resident.running:
            return False
        if resident.running[engine_id] == 1:
            self.end(resident, engine_id)
            return True
        resident.running[engine_id] -= 1
        self.running[engine_id] -= 1
        return False

    def end(self, resident: Resident, engine_id: int) -> None:
        """Count all requests of an id out."""
        del resident.running[engine_id], self.running[engine_id]
        resident.last_used = resident.idle_since = self._clock()

    def check_integrity(self, residents: Iterable[Resident]) -> None:
        """Raises AssertionError unless what runs is what the residents say."""
        running = {number: count for resident in residents for number, count in resident.running.items()}
        assert running == self.running and len(running) <= self.total, (running, self.running)
