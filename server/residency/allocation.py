"""Owns what one look over the waiters, first come first, has left to give: places on the device, turns in the engine's
step, bytes on the host.

Invariant: what was kept for a waiter is out of reach of all that came after it. A look changes nothing but itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from server.residency.state import GRACE_S, POOLS, Capacity, Pool, Resident

NEVER = float("inf")


@dataclass(frozen=True)
class AdmissionHolds:
    """Who lets nobody in any more, because a waiter whose patience is over needs their place or turn: residents, and
    engine ids. In the order in which they were closed; the next look closes them first again."""

    residents: dict[Resident, None] = field(default_factory=dict)
    ids: dict[int, None] = field(default_factory=dict)

    def holds(self, resident: Resident, engine_id: int) -> bool:
        return resident in self.residents or engine_id in self.ids


class SchedulingPass:
    """The three together. wake: when the passing of time alone changes what can be given. asked: residents that a
    place was looked for."""

    def __init__(
        self,
        capacity: Capacity,
        residents: Iterable[Resident],
        running: Mapping[int, int],
        before: AdmissionHolds,
        now: float,
    ) -> None:
        self.now, self.wake, self.closed = now, NEVER, AdmissionHolds()
        self.asked: set[Resident] = set()
        self._pools: dict[Pool, PoolBudget] = {
            pool: PoolBudget(capacity.of(pool), self.closed, before, now) for pool in POOLS
        }
        self.turns = StepSlots(capacity.running, running, self.closed, before)
        self.host = HostBytes(capacity.host_bytes)
        for resident in residents:
            if resident.holds_place or resident.pinned_by:
                self.places(resident).count(resident)
            if resident.move == "reading":
                self.host.count(resident)

    def places(self, resident: Resident) -> "PoolBudget":
        """The pool that a resident takes its place of."""
        return self._pools[resident.need.pool]

    def wake_at(self, time: float) -> None:
        """SchedulingPass again at `time`, if not earlier."""
        self.wake = min(self.wake, time)


class PoolBudget:
    """The places of one pool. grace_ends: when the next idle resident may leave."""

    def __init__(self, total: int, closed: AdmissionHolds, before: AdmissionHolds, now: float) -> None:
        self._total, self._now, self._closed, self._before = total, now, closed.residents, before.residents
        self._free, self._coming, self._pinned, self._idle, self._closable_size = total, 0, 0, 0, 0
        self._closable: dict[Resident, bool] = {}
        self._is_sorted = self._is_shut = False
        self.grace_ends = NEVER

    def count(self, resident: Resident) -> None:
        """What is there before anything is given."""
        place = resident.need.size
        if resident.holds_place:
            self._free -= place
        if resident.pinned_by:
            self._pinned += place
        if resident.can_be_closed:
            can_leave = not resident.running and resident.idle_since + GRACE_S <= self._now
            self._closable[resident] = can_leave
            self._closable_size += place
            if can_leave:
                self._idle += place
            elif not resident.running:
                self.grace_ends = min(self.grace_ends, resident.idle_since + GRACE_S)

    def can_ever_hold(self, resident: Resident) -> bool:
        """Whether the pins leave room for it."""
        place = resident.need.size
        pinned = self._pinned - (place if resident.pinned_by else 0)
        return pinned + place <= self._total

    def give(self, place: int) -> list[Resident] | None:
        """Give a place: who has to leave for it, least recently used first. None: there is none now."""
        if self._is_shut or place > self._free + self._idle:
            return None
        leaving: list[Resident] = []
        for other in self._in_order() if place > self._free else ():
            if place <= self._free:
                break
            if self._closable[other]:
                self.keep(other)
                leaving.append(other)
                self._free += other.need.size
        self._free -= place
        return leaving

    def let_in(self, resident: Resident) -> None:
        """A request runs there from now on: it cannot leave at once."""
        if self._closable.get(resident):
            self._closable[resident] = False
            self._idle -= resident.need.size

    def keep(self, resident: Resident) -> None:
        """It stays where it is, whoever comes later in this look: somebody has a claim to it."""
        can_leave = self._closable.pop(resident, None)
        if can_leave is not None:
            self._closable_size -= resident.need.size
            self._idle -= resident.need.size if can_leave else 0

    def close_for(self, place: int) -> None:
        """Keep a place for one whose patience is over: close residents, least recently used first, until it fits once
        they are idle. Where not even all of them are enough, nobody after it is given a place."""
        lacking = place - self._free - self._coming
        if self._is_shut or lacking > self._closable_size:
            self._is_shut = True
            return
        for other in self._in_order():
            if lacking <= 0:
                break
            self.keep(other)
            self._closed[other] = None
            lacking -= other.need.size
        self._free, self._coming = 0, -lacking

    def _in_order(self) -> list[Resident]:
        """Who may leave: those that were closed before, then the idle, then the running, least recently used first."""
        if not self._is_sorted:
            rank = {resident: number for number, resident in enumerate(self._before)}
            last = len(rank)
            order = sorted(self._closable, key=lambda r: (rank.get(r, last), bool(r.running), r.last_used))
            self._closable = {resident: self._closable[resident] for resident in order}
            self._is_sorted = True
        return list(self._closable)


class StepSlots:
    """Engine ids in one step. running: leases by engine id, the id least recently let in first (live)."""

    def __init__(self, total: int, running: Mapping[int, int], closed: AdmissionHolds, before: AdmissionHolds) -> None:
        self._total, self._running, self._closed, self._before = total, running, closed.ids, before.ids
        self._wanted: set[int] = set()

    def close_for(self, engine_id: int) -> None:
        """Keep a turn for an id whose patience is over: close others, so that it gets theirs."""
        self._wanted.add(engine_id)
        surplus = len(self._running.keys() | self._wanted) - self._total
        for other in (*(i for i in self._before if i in self._running), *self._running):
            if len(self._closed) >= surplus:
                return
            self._closed[other] = None


class HostBytes:
    """Bytes for host copies. Reading ahead for waiters ends where the budget does, so that a crowd of waiters does not
    fill the memory; the first in line may always read."""

    def __init__(self, total: int) -> None:
        self._total, self._taken = total, 0
        self._counted: set[Resident] = set()
        self._is_shut = False

    def count(self, resident: Resident) -> None:
        """A copy that is there for a waiter, or on its way."""
        if resident not in self._counted:
            self._counted.add(resident)
            self._taken += resident.need.host_bytes

    def allow(self, resident: Resident) -> bool:
        """Whether a copy may be read for a waiter."""
        fits = not self._taken or self._taken + resident.need.host_bytes <= self._total
        self._is_shut = self._is_shut or not fits
        if not self._is_shut:
            self.count(resident)
        return not self._is_shut
