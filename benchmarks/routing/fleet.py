"""Owns the simulated fleet: requests arrive, wait for an adapter and a seat, run and end, in virtual time (seconds).

Invariant: every request that arrived has a first token, unless the run ended before or its replica was killed while it
ran; those that waited on a killed replica go to another at once.
"""

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.machine import Machine
from benchmarks.routing.replica import DEVICE, HOST, NOBODY, Replica, Room
from benchmarks.routing.traffic import Traffic

Floats = NDArray[np.float64]
LOADED, ENDED = range(2)


class Policy(Protocol):
    """A way to choose replicas."""

    def choose(self, adapter: int, now: float) -> int:
        """The rank for a request."""

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        """Where an adapter with that share of all requests usually lies; every rank if anywhere."""

    def recall(self, adapters: Sequence[int], times: Sequence[float]) -> None:
        """Requests that came before the simulation began, at times below 0."""


class Fleet:
    """The replicas, and what a policy may look at.

    loads: rank of a live replica -> requests there, waiting or running. holders: adapter -> ranks that have it on the
    device, or on its way there.
    """

    def __init__(self, count: int, machine: Machine, room: Room, traffic: Traffic) -> None:
        self.machine, self.room, self.traffic = machine, room, traffic
        self.replicas = {rank: Replica(rank, machine, room) for rank in range(count)}
        self.loads = dict.fromkeys(self.replicas, 0)
        self.holders: dict[int, dict[int, None]] = {}
        self.now = 0.0
        self.lost = 0
        requests = len(traffic.arrivals)
        self.first: Floats = np.full(requests, np.nan)
        self.tier = np.full(requests, -1, np.int8)
        self.loaded_at: list[tuple[float, int, int]] = []
        """(when, adapter, tier it came from) of every load onto a device."""
        self.sampled: list[tuple[float, float, float]] = []
        """(when, the largest load, the mean load), once a second."""
        self._events: list[tuple[float, int, int, Replica, int]] = []
        self._count = 0
        self._on_replica: dict[int, dict[int, None]] = {rank: {} for rank in self.replicas}

    def add(self) -> int:
        """A new replica, with nothing on its disk; its rank."""
        rank = max(self.replicas) + 1
        self.replicas[rank] = Replica(rank, self.machine, self.room)
        self.loads[rank] = 0
        self._on_replica[rank] = {}
        return rank

    def kill(self, rank: int, policy: Policy) -> None:
        """End a replica at once; what ran there is lost, what waited there is sent elsewhere."""
        gone = self.replicas.pop(rank)
        del self.loads[rank]
        for adapter in gone.device:
            del self.holders[adapter][rank]
        for request in self._on_replica.pop(rank):
            if np.isnan(self.first[request]) or self.first[request] > self.now:
                self._send(request, policy)
            else:
                self.lost += 1

    def run(self, policy: Policy, happenings: Iterable[tuple[float, Callable[[], object]]], end: float) -> None:
        """Run until `end`; each happening is called at its time."""
        arrivals = self.traffic.arrivals.tolist()
        todo = sorted(happenings, key=lambda item: item[0])
        sample, request, events = 0.0, 0, self._events
        while True:
            arrival = arrivals[request] if request < len(arrivals) else end
            self.now = min(arrival, events[0][0] if events else end, todo[0][0] if todo else end, sample)
            if self.now >= end:
                return
            if self.now == sample:
                loads = self.loads.values()
                self.sampled.append((sample, max(loads), sum(loads) / len(loads)))
                sample += 1.0
            elif todo and self.now == todo[0][0]:
                todo.pop(0)[1]()
            elif events and self.now == events[0][0]:
                _, _, kind, replica, what = heappop(events)
                if self.replicas.get(replica.rank) is replica:
                    (self._loaded if kind == LOADED else self._ended)(replica, what)
            else:
                self._send(request, policy)
                request += 1

    def _send(self, request: int, policy: Policy) -> None:
        rank = policy.choose(self.traffic.adapters[request], self.now)
        self.loads[rank] += 1
        self._on_replica[rank][request] = None
        self._admit(self.replicas[rank], request)

    def _admit(self, replica: Replica, request: int) -> None:
        adapter = self.traffic.adapters[request]
        if adapter in replica.device:
            replica.device.move_to_end(adapter)
            replica.users[adapter] = replica.users.get(adapter, 0) + 1
            waiters = replica.loading.get(adapter)
            if waiters is None:
                self.tier[request] = DEVICE
                self._seat(replica, request)
            else:
                self.tier[request] = HOST
                waiters.append(request)
        elif (victim := replica.victim()) is None:
            replica.for_room.append(request)
        else:
            self._load(replica, request, adapter, victim)

    def _load(self, replica: Replica, request: int, adapter: int, victim: int) -> None:
        if victim != NOBODY:
            del replica.device[victim]
            del self.holders[victim][replica.rank]
        replica.device[adapter] = None
        replica.users[adapter] = 1
        replica.loading[adapter] = [request]
        self.holders.setdefault(adapter, {})[replica.rank] = None
        tier, there = replica.load(adapter, self.now)
        self.tier[request] = tier
        self.loaded_at.append((self.now, adapter, tier))
        self._push(there, LOADED, replica, adapter)

    def _loaded(self, replica: Replica, adapter: int) -> None:
        for request in replica.loading.pop(adapter):
            self._seat(replica, request)

    def _seat(self, replica: Replica, request: int) -> None:
        if replica.running < self.machine.seats:
            self._start(replica, request)
        else:
            replica.for_seat.append(request)

    def _start(self, replica: Replica, request: int) -> None:
        replica.running += 1
        step = self.machine.step(replica.running)
        first = self.now + self.machine.prefill(self.traffic.prompts[request]) + step
        self.first[request] = first
        self._push(first + self.traffic.answers[request] * step, ENDED, replica, request)

    def _ended(self, replica: Replica, request: int) -> None:
        replica.running -= 1
        self.loads[replica.rank] -= 1
        del self._on_replica[replica.rank][request]
        adapter = self.traffic.adapters[request]
        replica.users[adapter] -= 1
        if replica.for_seat:
            self._start(replica, replica.for_seat.popleft())
        while replica.for_room and self._has_room(replica, replica.for_room[0]):
            self._admit(replica, replica.for_room.popleft())

    def _has_room(self, replica: Replica, request: int) -> bool:
        return self.traffic.adapters[request] in replica.device or replica.victim() is not None

    def _push(self, when: float, kind: int, replica: Replica, what: int) -> None:
        self._count += 1
        heappush(self._events, (when, self._count, kind, replica, what))
