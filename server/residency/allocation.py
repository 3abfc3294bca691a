"""Owns one scheduling pass over the waiters, first come first served: what is left to allocate (room on the device,
slots in the engine's step, bytes on the host) and how far each waiter gets.

Invariant: what is reserved for a waiter is out of reach of all that came after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

from server.errors import ServerError
from server.residency.state import GRACE_S, POOLS, Capacity, Leases, Loaded, Resident
from server.residency.waiting import BaseWaiter, Group, Sequences, Waiter, WaitQueue

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
        self._opened: dict[int, None] = {}
        self._kept: set[int] = set()
        self._closable: set[int] = set()

    def open(self, engine_id: int) -> bool:
        """Let requests of an id in, unless others take all slots."""
        is_open = len({*self._running, *self._opened, engine_id}) <= self._total
        if is_open:
            self._opened[engine_id] = None
        return is_open

    def keep(self, engine_id: int) -> None:
        """It is the turn of that id: it is not held for others."""
        self._kept.add(engine_id)

    def may_close(self, engine_id: int) -> None:
        """The turn of that id is over, and others may have its slot if none of its requests runs."""
        self._closable.add(engine_id)

    def hold_for(self, engine_id: int) -> None:
        """Keep a slot for an id whose patience is over: hold others, so that it gets theirs."""
        self._wanted.add(engine_id)
        running = (*self._running, *(other for other in self._opened if other not in self._running))
        surplus = len({*running, *self._wanted}) - self._total
        for other in (*(i for i in self._held_before if i in running), *running):
            if len(self._held) >= surplus:
                return
            if other not in self._kept:
                self._held[other] = None
                if other in self._closable and other not in self._running:
                    self._opened.pop(other, None)


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


Refusal = Callable[[Waiter[Resident], float, bool], ServerError | None]
"""(waiter, now in monotonic seconds, whether the pins leave it room) -> why waiting is useless; None if it is not."""


class Admissible(NamedTuple):
    """A group whose requests only wait for a free sequence. is_whole: there is one for each of them."""

    resident: Resident
    engine_id: int
    group: Group
    is_whole: bool

    def is_open(self, leases: Leases, holds: AdmissionHolds) -> bool:
        """Whether one of them may run now. All who waited when the adapter's place came do, though it is held."""
        no_holds = AdmissionHolds() if self.is_whole else holds
        return bool(self.group) and is_open(self.resident, self.engine_id, leases, no_holds)


class SchedulingPass:
    """One pass. now, wake_at: monotonic seconds; wake_at: when the passing of time alone changes what can be allocated.

    before: what the last pass held. holds: what this one does. may_run: the groups whose requests only wait for a free
    sequence.
    """

    def __init__(
        self,
        capacity: Capacity,
        loaded: Loaded,
        leases: Leases,
        waiters: WaitQueue[Resident],
        sequences: Sequences,
        mover: Mover,
        before: AdmissionHolds,
        now: float,
    ) -> None:
        self.now, self.wake_at, self.holds = now, NEVER, AdmissionHolds()
        self.may_run: list[Admissible] = []
        self._leases, self._waiters, self._mover = leases, waiters, mover
        self._placed_for: set[Resident] = set()
        self._budgets = {pool: PoolBudget(capacity.of(pool), self.holds, before, now) for pool in POOLS}
        self._step_slots = StepSlots(leases.total, leases.running, self.holds, before)
        self._sequences_free = sequences.free - sequences.reserved - len(sequences.base)
        self._host = HostBudget(capacity.host_bytes)
        for pool in POOLS:
            for resident in loaded.on_device(pool):
                self._budgets[pool].count(resident)
        for resident in loaded.reading:
            self._host.count(resident)

    def run(self, refusal: Refusal) -> None:
        """Move every group of waiters on as far as it can go now, in their order."""
        for waiter in self._waiters.fronts(self.now):
            group = self._waiters.group(waiter.adapter.engine_id) if waiter.wants == "lease" else None
            if group is None:
                self._advance(waiter, refusal)
            elif not self._let_in(waiter, group):
                group.close_turn(self.now)
                self._advance(waiter, refusal)

    def _let_in(self, first: Waiter[Resident], group: Group) -> bool:
        """Let a group run as far as there are free sequences: everyone who waits by now. While it is its turn, those
        for whom there is none keep the adapter. False if its adapter is not there, held, or has no slot in the step."""
        resident, engine_id = first.resident, first.adapter.engine_id
        if not is_open(resident, engine_id, self._leases, self.holds) or not self._step_slots.open(engine_id):
            return False
        turn_ends_at = group.open_turn(self.now)
        self._sequences_free -= len(group)
        self.may_run.append(Admissible(resident, engine_id, group, self._sequences_free >= 0))
        if self._sequences_free < 0 and self.now < turn_ends_at:
            self.wake_at = min(self.wake_at, turn_ends_at)
            self._step_slots.keep(engine_id)
            self._budget(resident).reserve(resident)
        elif self._sequences_free >= 0:
            self._budget(resident).mark_running(resident)
        else:
            self._step_slots.may_close(engine_id)
        return True

    def _advance(self, waiter: Waiter[Resident], refusal: Refusal) -> None:
        resident, wants = waiter.resident, waiter.wants
        if (resident.on_device and wants != "lease") or (resident.on_host and wants == "host"):
            self._waiters.answer(waiter)
        elif resident.is_usable:
            self._await_step_slot(waiter)
        elif (error := refusal(waiter, self.now, self._budget(resident).can_ever_hold(resident))) is not None:
            self._refuse(waiter, error, refusal)
        elif not resident.is_busy and not resident.is_lost:
            self._start_move(waiter)

    def _refuse(self, waiter: Waiter[Resident], error: ServerError, refusal: Refusal) -> None:
        """What makes waiting useless for the first of a group does so for all."""
        self._waiters.answer(waiter, error)
        group = self._waiters.group(waiter.adapter.engine_id) if waiter.wants == "lease" else None
        while group and (mate := group.first()) is not None:
            again = refusal(mate, self.now, self._budget(mate.resident).can_ever_hold(mate.resident))
            assert again is not None, "the reason is the adapter's"
            self._waiters.answer(mate, again)

    def _start_move(self, waiter: Waiter[Resident]) -> None:
        """Start the next move towards the device; an activation is read whatever else waits on the host."""
        resident = waiter.resident
        if not resident.on_host:
            if self._host.allow(resident) or waiter.wants == "host":
                self._mover.read(resident)
        elif resident not in self._placed_for:
            self._placed_for.add(resident)
            self._host.count(resident)
            self._find_room(waiter)

    def _await_step_slot(self, waiter: Waiter[Resident]) -> None:
        """It is on the device, but too many adapters are running, or it is held."""
        if self.holds.holds(waiter.resident, waiter.adapter.engine_id):
            return
        self._budget(waiter.resident).reserve(waiter.resident)
        if self._is_overdue(waiter):
            self._step_slots.hold_for(waiter.adapter.engine_id)
            group = self._waiters.group(waiter.adapter.engine_id)
            if group is not None:
                self._let_in(waiter, group)

    def _find_room(self, waiter: Waiter[Resident]) -> None:
        """Start host to device if room can be made; else wait, and once patience is over, hold adapters for it."""
        budget, size = self._budget(waiter.resident), waiter.resident.need.size
        evicted = budget.allocate(size)
        if evicted is not None:
            self._mover.place(waiter.resident, evicted)
            return
        self.wake_at = min(self.wake_at, budget.grace_ends_at)
        if self._is_overdue(waiter):
            budget.hold_for(size)

    def _is_overdue(self, waiter: Waiter[Resident]) -> bool:
        overdue_at = waiter.since + PATIENCE_S
        if self.now < overdue_at:
            self.wake_at = min(self.wake_at, overdue_at)
        return self.now >= overdue_at

    def _budget(self, resident: Resident) -> PoolBudget:
        """The budget of the pool that a resident takes its room from."""
        return self._budgets[resident.need.pool]


def is_open(resident: Resident, engine_id: int, leases: Leases, holds: AdmissionHolds) -> bool:
    """Whether a request may run now, if there is a free sequence."""
    return resident.is_usable and not holds.holds(resident, engine_id) and leases.has_slot(engine_id)


def fill(
    may_run: list[Admissible],
    leases: Leases,
    waiters: WaitQueue[Resident],
    sequences: Sequences,
    holds: AdmissionHolds,
) -> None:
    """Admit those who only wait for a free sequence, as long as there is one."""
    while sequences.free > 0:
        open_groups = [each.group for each in may_run if each.is_open(leases, holds)]
        request = sequences.next_of((*open_groups, sequences.base))
        if request is None:
            return
        sequences.take(request.label)
        request.is_granted = True
        if isinstance(request, BaseWaiter):
            sequences.base.remove(request)
            request.ready.set_result(None)
        else:
            leases.admit(request.resident, request.adapter.engine_id)
            waiters.answer(request)


def surplus_host_copies(loaded: Loaded, host_bytes: int, kept: set[Resident]) -> list[Resident]:
    """Host copies to drop until the rest fits into `host_bytes`, except the `kept` and those being moved.

    Those of adapters on the device go first, then the least recently used.
    """
    surplus = loaded.on_host.total - host_bytes
    dropped: dict[Resident, None] = {}
    if surplus <= 0:
        return []
    on_device = [resident for pool in POOLS for resident in loaded.holding[pool] if resident.on_host]
    twice = sorted((r for r in on_device if r.on_device), key=lambda r: r.last_used)
    for resident in chain(twice, loaded.on_host):
        if surplus <= 0:
            break
        if not resident.is_busy and resident not in kept and resident not in dropped:
            dropped[resident] = None
            surplus -= resident.need.host_bytes
    return list(dropped)
