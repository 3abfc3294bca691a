"""Owns the waiters, their order, and how many sequences run in the engine at once.

A version's requests wait as one group, so that a pass looks at groups, and those of the base wait as another. Of the
requests that may run, the next free sequence goes to the key with the fewest sequences running; among equals, to the
one that was served longest ago; a few are kept for keys that have none.

Invariant: within one group and key, first come is first served.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Literal, TypeVar

from adapters.ref import AdapterRef

Content = TypeVar("Content")
"""What is waited for (server.residency.state.Resident)."""
Label = str | None
"""Of a key; None for the callers without one, together."""

RESERVED_PART = 16
"""One in so many sequences is kept for keys that have none running."""
TURN_S = 2.0
"""Seconds for which requests that wait only for a free sequence keep their adapter from being held for others."""


@dataclass(eq=False)
class Waiter(Generic[Content]):
    """What waits for an adapter: an activation (for the host), a pin (for the device), a request (for a lease).

    since: monotonic seconds. number: in the order they came. ready: ends the wait. is_granted: the lease is counted.
    """

    resident: Content
    adapter: AdapterRef
    wants: Literal["host", "device", "lease"]
    since: float
    number: int
    ready: asyncio.Future[None]
    label: Label = None
    is_granted: bool = False


@dataclass(eq=False)
class BaseWaiter:
    """A request without an adapter, which waits only for a free sequence."""

    number: int
    ready: asyncio.Future[None]
    label: Label = None
    is_granted: bool = False


Request = Waiter[Any] | BaseWaiter


@dataclass(eq=False)
class Group:
    """The requests that wait for one version (or the base), in the order they came.

    turn_began: since when they could run if there were free sequences (monotonic seconds; None: they cannot).
    behind: the end of a turn that was too short for all of them: who waited by then is served before them.
    """

    members: dict[Request, None] = field(default_factory=dict)
    by_label: dict[Label, dict[Request, None]] = field(default_factory=dict)
    turn_began: float | None = None
    behind: float = -math.inf

    def __len__(self) -> int:
        return len(self.members)

    def add(self, request: Request) -> None:
        self.members[request] = None
        self.by_label.setdefault(request.label, {})[request] = None

    def remove(self, request: Request) -> None:
        del self.members[request]
        mates = self.by_label[request.label]
        del mates[request]
        if not mates:
            del self.by_label[request.label]

    def first(self) -> Waiter[Any] | None:
        """The first that still waits (a cancelled one leaves a moment later)."""
        found = _first(self.members)
        assert not isinstance(found, BaseWaiter)
        return found

    def open_turn(self, now: float) -> float:
        """Its requests could run now; returns when their turn ends."""
        if self.turn_began is None:
            self.turn_began = now
        ends_at = self.turn_began + TURN_S
        if now >= ends_at:
            self.behind = ends_at
        return ends_at

    def close_turn(self, now: float) -> None:
        """Its requests cannot run any more."""
        if self.turn_began is not None:
            self.turn_began, self.behind = None, now

    def is_in_turn(self, now: float) -> bool:
        return self.turn_began is not None and now < self.turn_began + TURN_S


class WaitQueue(Generic[Content]):
    """The waiters of adapters; `requests` counts exactly the requests among them."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}
        self._others: dict[Waiter[Content], None] = {}

    def __bool__(self) -> bool:
        return bool(self._groups or self._others)

    def __contains__(self, waiter: Waiter[Content]) -> bool:
        group = self._groups.get(waiter.adapter.engine_id)
        return waiter in self._others or (group is not None and waiter in group.members)

    def group(self, engine_id: int) -> Group | None:
        """The requests that wait for one version."""
        return self._groups.get(engine_id)

    def fronts(self, now: float) -> list[Waiter[Content]]:
        """The first request of each group, and all that are no requests, in the order in which they are served."""
        firsts = [(group, first) for group in self._groups.values() if (first := group.first()) is not None]
        ranked = [(not group.is_in_turn(now), max(first.since, group.behind), first) for group, first in firsts]
        ranked += [(True, waiter.since, waiter) for waiter in self._others if not waiter.ready.done()]
        return [waiter for *_, waiter in sorted(ranked, key=lambda rank: (*rank[:2], rank[2].number))]

    def pending(self) -> bool:
        """Whether any waiter has no answer yet."""
        groups = (group.first() for group in self._groups.values())
        return any(groups) or any(not waiter.ready.done() for waiter in self._others)

    def of(self, engine_id: int) -> list[Waiter[Content]]:
        """Those that wait for one version."""
        group = self._groups.get(engine_id)
        requests = [] if group is None else [each for each in group.members if isinstance(each, Waiter)]
        return requests + [waiter for waiter in self._others if waiter.adapter.engine_id == engine_id]

    def residents(self) -> set[Content]:
        """What is waited for."""
        waiters = (*self._others, *(next(iter(group.members)) for group in self._groups.values()))
        return {waiter.resident for waiter in waiters if isinstance(waiter, Waiter)}

    def requests(self, engine_id: int) -> int:
        """How many requests wait for one version."""
        return len(self._groups.get(engine_id, ()))

    def add(self, waiter: Waiter[Content]) -> None:
        if waiter.wants == "lease":
            self._groups.setdefault(waiter.adapter.engine_id, Group()).add(waiter)
        else:
            self._others[waiter] = None

    def remove(self, waiter: Waiter[Content]) -> None:
        if waiter.wants != "lease":
            del self._others[waiter]
            return
        group = self._groups[waiter.adapter.engine_id]
        group.remove(waiter)
        if not group:
            del self._groups[waiter.adapter.engine_id]

    def answer(self, waiter: Waiter[Content], error: Exception | None = None) -> None:
        """End a wait; `error` is raised there."""
        self.remove(waiter)
        if waiter.ready.done():
            return
        if error is None:
            waiter.ready.set_result(None)
        else:
            waiter.ready.set_exception(error)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every request is in the group of its version and key, and no group is empty."""
        for engine_id, group in self._groups.items():
            assert group, f"no request waits for {engine_id}"
            assert {each for mates in group.by_label.values() for each in mates} == group.members.keys()
            assert all(isinstance(each, Waiter) and each.adapter.engine_id == engine_id for each in group.members)
        assert all(waiter.wants != "lease" for waiter in self._others)


class Sequences:
    """The sequences in the engine, by key. total: how many it takes at once (None: any number). reserved: how many of
    them only a key gets that has none running, so that it need not wait for another key's to end."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.reserved = 0 if total is None else total // RESERVED_PART
        self.running: Counter[Label] = Counter()
        self.used = 0
        self.base = Group()
        """Requests without an adapter that wait."""
        self._served: dict[Label, int] = {}
        self._numbers = count(1)

    @property
    def free(self) -> float:
        return math.inf if self.total is None else self.total - self.used

    def is_free_for(self, label: Label) -> bool:
        """Whether a key may have one more. (Without keys, none are reserved.)"""
        is_first = label is None or not self.running[label]
        return self.free > (0 if is_first else self.reserved)

    def take(self, label: Label) -> None:
        """Count a sequence in."""
        assert self.free > 0, self.used
        self.running[label] += 1
        self.used += 1
        self._served[label] = next(self._numbers)

    def give_back(self, label: Label) -> None:
        """Count a sequence out."""
        assert self.running[label] > 0, label
        self.running[label] -= 1
        self.used -= 1
        if not self.running[label]:
            del self.running[label]

    @asynccontextmanager
    async def lease(self, label: Label, number: int, refill: Callable[[], None]) -> AsyncIterator[None]:
        """Hold a sequence without an adapter. number: see Waiter. refill: is called when a sequence is free again."""
        if self.is_free_for(label):
            self.take(label)
        else:
            await self._wait(BaseWaiter(number, asyncio.get_running_loop().create_future(), label), refill)
        try:
            yield
        finally:
            self.give_back(label)
            refill()

    async def _wait(self, waiter: BaseWaiter, refill: Callable[[], None]) -> None:
        self.base.add(waiter)
        try:
            await waiter.ready
        except BaseException:
            if waiter in self.base.members:
                self.base.remove(waiter)
            elif waiter.is_granted:
                self.give_back(waiter.label)
                refill()
            raise

    def next_of(self, groups: Iterable[Group]) -> Request | None:
        """The next request to run, of those that may."""
        heads = [
            ((self.running[label], self._served.get(label, 0), first.number), first)
            for group in groups
            for label, mates in group.by_label.items()
            if self.is_free_for(label) and (first := _first(mates)) is not None
        ]
        return min(heads, key=lambda head: head[0])[1] if heads else None

    def check_integrity(self) -> None:
        """Raises AssertionError unless the counts agree and fit."""
        assert self.used == self.running.total() and self.free >= 0, (self.used, self.running, self.total)
        assert self.next_of([self.base]) is None, "a request waits for a sequence that is free"


def _first(requests: Iterable[Request]) -> "Request | None":
    waiting: Iterator[Request] = (each for each in requests if not each.ready.done())
    return next(waiting, None)
