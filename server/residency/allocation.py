"""Owns one scheduling pass over the waiters, first come first served: what is left to allocate (room on the device,
slots in the engine's step, bytes on the host) and how far each waiter gets.

Invariant: what is reserved for a waiter is out of reach of all that came after it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.errors import ServerError
from server.residency.state import GRACE_S, POOLS, Capacity, Leases, Resident, Waiter, WaitQueue

NEVER = float("inf")
PATIENCE_S = 0.5
"""Seconds that a waiter lets later ones pass."""


@dataclass(frozen=True)
class AdmissionHolds:
    """Which adapters admit no new request, because a waiter whose patience is over needs their room or step slot:
    residents, and engine ids. In the order in which they were held; the next pass holds them first again."""

    residents: dict[Resident, None] = field(default_factory=dict)
    engine_ids: dict[int, None] = field(default_factory=dict)

    def holds(self, resident: Resident, engine_id: int) -> bool:
        return resident in self.residents or engine_id in self.engine_ids


class PoolBudget:
    """The room of one pool. grace_ends_at: when the next idle resident can be evicted (monotonic seconds)."""

    def __init__(self, total: int, holds: AdmissionHolds, before: AdmissionHolds, now: float) -> None:
        self._total, self._now, self._held, self._held_before = total, now, holds.residents, before.residents
        self._free, self._coming, self._pinned, self._idle, self._evictable_size = total, 0, 0, 0, 0
        self._evictable: dict[Resident, bool] = {}
        """Resident -> whether it is idle."""
        self._is_sorted = self._is_exhausted = False
        self.grace_ends_at = NEVER

    def count(self, resident: Resident) -> None:
        """Count what is there before anything is allocated."""
        size = resident.need.size
        if resident.holds_room:
            self._free -= size
        if resident.pinned_by:
            self._pinned += size
        if resident.is_evictable:
            is_idle = not resident.running and resident.idle_since + GRACE_S <= self._now
            self._evictable[resident] = is_idle
            self._evictable_size += size
            if is_idle:
                self._idle += size
            elif not resident.running:
                self.grace_ends_at = min(self.grace_ends_at, resident.idle_since + GRACE_S)

    def can_ever_hold(self, resident: Resident) -> bool:
        """Whether the pins leave room for it."""
        size = resident.need.size
        pinned = self._pinned - (size if resident.pinned_by else 0)
        return pinned + size <= self._total

    def allocate(self, size: int) -> list[Resident] | None:
        """Allocate room: which residents to evict for it, least recently used first. None: there is none now."""
        if self._is_exhausted or size > self._free + self._idle:
            return None
        evicted: list[Resident] = []
        for resident in self._in_order() if size > self._free else ():
            if size <= self._free:
                break
            if self._evictable[resident]:
                self.reserve(resident)
                evicted.append(resident)
                self._free += resident.need.size
        self._free -= size
        return evicted

    def mark_running(self, resident: Resident) -> None:
        """A request runs on it from now on: it cannot be evicted at once."""
        if self._evictable.get(resident):
            self._evictable[resident] = False
            self._idle -= resident.need.size

    def reserve(self, resident: Resident) -> None:
        """Keep it where it is for the rest of this pass: a waiter has a claim to it, or to its room."""
        is_idle = self._evictable.pop(resident, None)
        if is_idle is not None:
            self._evictable_size -= resident.need.size
            self._idle -= resident.need.size if is_idle else 0

    def hold_for(self, size: int) -> None:
        """Keep room for a waiter whose patience is over: hold residents, least recently used first, until it fits once
        they are idle. Where not even all of them are enough, no later waiter is allocated room."""
        lacking = size - self._free - self._coming
        if self._is_exhausted or lacking > self._evictable_size:
            self._is_exhausted = True
            return
        for resident in self._in_order():
            if lacking <= 0:
                break
            self.reserve(resident)
            self._held[resident] = None
            lacking -= resident.need.size
        self._free, self._coming = 0, -lacking

    def _in_order(self) -> list[Resident]:
        """What can be evicted: those held before, then the idle, then the running, least recently used first."""
        if not self._is_sorted:
            rank = {resident: number for number, resident in enumerate(self._held_before)}
            last = len(rank)
            order = sorted(self._evictable, key=lambda r: (rank.get(r, last), bool(r.running), r.last_used))
            self._evictable = {resident: self._evictable[resident] for resident in order}
            self._is_sorted = True
        return list(self._evictable)


class StepSlots:
    """Engine ids in one step. running: leases by engine id, the id least recently admitted first (live)."""

    def __init__(self, total: int, running: Mapping[int, int], holds: AdmissionHolds, before: AdmissionHolds) -> None:
        self._total, self._running = total, running
        self._held, self._held_before = holds.engine_ids, before.engine_ids
        self._wanted: set[int] = set()

    def hold_for(self, engine_id: int) -> None:
        """Keep a slot for an id whose patience is over: hold others, so that it gets theirs."""
        self._wanted.add(engine_id)
        surplus = len(self._running.keys() | self._wanted) - self._total
        for other in (*(i for i in self._held_before if i in self._running), *self._running):
            if len(self._held) >= surplus:
                return
            self._held[other] = None


class HostBudget:
    """Bytes for host copies. Reading ahead for waiters ends where the budget does, so that a crowd of waiters does not
    fill the memory; the first in line may always read."""

    def __init__(self, total: int) -> None:
        self._total, self._taken = total, 0
        self._counted: set[Resident] = set()
        self._is_exhausted = False

    def count(self, resident: Resident) -> None:
        """Count a copy that is there for a waiter, or on its way."""
        if resident not in self._counted:
            self._counted.add(resident)
            self._taken += resident.need.host_bytes

    def allow(self, resident: Resident) -> bool:
        """Whether a copy may be read for a waiter."""
        fits = not self._taken or self._taken + resident.need.host_bytes <= self._total
        self._is_exhausted = self._is_exhausted or not fits
        if not self._is_exhausted:
            self.count(resident)
        return not self._is_exhausted


class Mover(Protocol):
    """What starts a move (residency/transfers)."""

    def read(self, resident: Resident) -> None: ...

    def place(self, resident: Resident, evicted: Sequence[Resident]) -> None: ...


Refusal = Callable[[Waiter, float, bool], ServerError | None]
"""(waiter, now in monotonic seconds, whether the pins leave it room) -> why waiting is useless; None if it is not."""


class SchedulingPass:
    """One pass. now, wake_at: monotonic seconds; wake_at: when the passing of time alone changes what can be allocated.

    before: what the last pass held. holds: what this one does.
    """

    def __init__(
        self,
        capacity: Capacity,
        residents: Iterable[Resident],
        leases: Leases,
        waiters: WaitQueue,
        mover: Mover,
        before: AdmissionHolds,
        now: float,
    ) -> None:
        self.now, self.wake_at, self.holds = now, NEVER, AdmissionHolds()
        self._leases, self._waiters, self._mover = leases, waiters, mover
        self._placed_for: set[Resident] = set()
        self._budgets = {pool: PoolBudget(capacity.of(pool), self.holds, before, now) for pool in POOLS}
        self._step_slots = StepSlots(leases.total, leases.running, self.holds, before)
        self._host = HostBudget(capacity.host_bytes)
        for resident in residents:
            if resident.holds_room or resident.pinned_by:
                self._budget(resident).count(resident)
            if resident.move == "reading":
                self._host.count(resident)

    def run(self, refusal: Refusal) -> None:
        """Move every waiter on as far as it can go now, in the order they came."""
        for waiter in self._waiters.pending():
            self._advance(waiter, refusal)

    def _advance(self, waiter: Waiter, refusal: Refusal) -> None:
        resident, wants, engine_id = waiter.resident, waiter.wants, waiter.adapter.engine_id
        if wants == "lease" and is_open(resident, engine_id, self._leases, self.holds):
            self._leases.admit(resident, engine_id)
            self._budget(resident).mark_running(resident)
            waiter.is_granted = True
            self._waiters.answer(waiter)
        elif (resident.on_device and wants != "lease") or (resident.on_host and wants == "host"):
            self._waiters.answer(waiter)
        elif resident.on_device and not resident.is_lost:
            self._await_step_slot(waiter)
        elif (error := refusal(waiter, self.now, self._budget(resident).can_ever_hold(resident))) is not None:
            self._waiters.answer(waiter, error)
        elif not resident.is_busy and not resident.is_lost:
            self._start_move(waiter)

    def _start_move(self, waiter: Waiter) -> None:
        """Start the next move towards the device; an activation is read whatever else waits on the host."""
        resident = waiter.resident
        if not resident.on_host:
            if self._host.allow(resident) or waiter.wants == "host":
                self._mover.read(resident)
        elif resident not in self._placed_for:
            self._placed_for.add(resident)
            self._host.count(resident)
            self._find_room(waiter)

    def _await_step_slot(self, waiter: Waiter) -> None:
        """It is on the device, but too many adapters are running, or it is held."""
        if self.holds.holds(waiter.resident, waiter.adapter.engine_id):
            return
        self._budget(waiter.resident).reserve(waiter.resident)
        if self._is_overdue(waiter):
            self._step_slots.hold_for(waiter.adapter.engine_id)

    def _find_room(self, waiter: Waiter) -> None:
        """Start host to device if room can be made; else wait, and once patience is over, hold adapters for it."""
        budget, size = self._budget(waiter.resident), waiter.resident.need.size
        evicted = budget.allocate(size)
        if evicted is not None:
            self._mover.place(waiter.resident, evicted)
            return
        self.wake_at = min(self.wake_at, budget.grace_ends_at)
        if self._is_overdue(waiter):
            budget.hold_for(size)

    def _is_overdue(self, waiter: Waiter) -> bool:
        overdue_at = waiter.since + PATIENCE_S
        if self.now < overdue_at:
            self.wake_at = min(self.wake_at, overdue_at)
        return self.now >= overdue_at

    def _budget(self, resident: Resident) -> PoolBudget:
        """The budget of the pool that a resident takes its room from."""
        return self._budgets[resident.need.pool]


def is_open(resident: Resident, engine_id: int, leases: Leases, holds: AdmissionHolds) -> bool:
    """Whether a request may run now."""
    is_usable = resident.on_device and not resident.is_lost
    return is_usable and not holds.holds(resident, engine_id) and leases.has_slot(engine_id)


def surplus_host_copies(residents: Iterable[Resident], host_bytes: int, kept: set[Resident]) -> list[Resident]:
    """Host copies to drop until the rest fits into `host_bytes`, except the `kept` and those being moved.

    Those of adapters on the device go first, then the least recently used.
    """
    on_host = [resident for resident in residents if resident.on_host]
    held = sum(resident.need.host_bytes for resident in on_host)
    dropped: list[Resident] = []
    spare = [resident for resident in on_host if not resident.is_busy and resident not in kept]
    for resident in sorted(spare, key=lambda r: (not r.on_device, r.last_used)) if held > host_bytes else ():
        if held <= host_bytes:
            break
        held -= resident.need.host_bytes
        dropped.append(resident)
    return dropped
