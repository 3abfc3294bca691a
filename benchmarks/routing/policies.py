"""Owns the ways to choose a replica that are compared. Ours is the code that the server's router runs.

One router, which sees the true loads at once; llm-d's sees those of its last scrape. The rules of Ray 2.60.0, of
llm-d-router and of HAProxy were read in their source and written anew.
"""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from random import Random

from benchmarks.routing.fleet import Fleet, Policy
from server.routing import rendezvous
from server.routing.rendezvous import LEAST_HOMES, Popularity, choose, home_count, preferences

USUAL_LOAD = 16


class _Anywhere:
    """What policies share that remember nothing."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        self.fleet, self.random = fleet, random

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        return tuple(self.fleet.loads)

    def recall(self, adapters: Sequence[int], times: Sequence[float]) -> None:
        pass


class RoundRobin(_Anywhere):
    """One after the other: the floor. What sticks to a session and not to an adapter does no better."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self._turn = 0

    def choose(self, adapter: int, now: float) -> int:
        ranks = tuple(self.fleet.loads)
        self._turn = (self._turn + 1) % len(ranks)
        return ranks[self._turn]


class TwoChoices(_Anywhere):
    """The less busy of two at random: Ray Serve's default."""

    def choose(self, adapter: int, now: float) -> int:
        return rendezvous.two_choices(self.fleet.loads, self.random)


class _WhereLoaded(_Anywhere):
    """What policies share that go by where adapters are: at first each is on so many as its requests fill."""

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        ranks = tuple(self.fleet.loads)
        return self.random.sample(ranks, min(len(ranks), max(1, math.ceil(share * len(ranks)))))


class RayMultiplex(_WhereLoaded):
    """Two choices among the replicas that have the adapter; if both are full, among those with the fewest adapters,
    then among all. `most`: max_ongoing_requests, which Serve LLM leaves unbounded."""

    most: float = math.inf

    def choose(self, adapter: int, now: float) -> int:
        loads = self.fleet.loads
        for candidates in (self._holders, self._fewest, self._all):
            found = candidates(adapter)
            if found:
                rank = self._less_busy(found)
                if loads[rank] < self.most:
                    return rank
        return min(loads, key=loads.__getitem__)

    def _less_busy(self, ranks: Sequence[int]) -> int:
        loads = self.fleet.loads
        return min(self.random.sample(ranks, min(2, len(ranks))), key=loads.__getitem__)

    def _holders(self, adapter: int) -> Sequence[int]:
        return tuple(self.fleet.holders.get(adapter, ()))

    def _fewest(self, adapter: int) -> Sequence[int]:
        counts = {rank: len(replica.device) for rank, replica in self.fleet.replicas.items()}
        fewest = min(counts.values())
        return [rank for rank, count in counts.items() if count == fewest]

    def _all(self, adapter: int) -> Sequence[int]:
        return tuple(self.fleet.loads)


class RayMultiplexBounded(RayMultiplex):
    """With max_ongoing_requests at 1.5 times the seats."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self.most = 1.5 * fleet.machine.seats


class LlmD(_WhereLoaded):
    """The best score: affinity (1 with the adapter on the device, 0.8 with room for it, else 0), and queue (the longest
    queue of waiting requests 0, the shortest 1) with twice its weight. Both are scraped every 50 ms."""

    SCRAPE_S = 0.05
    AFFINITY, QUEUE = 1.0, 2.0

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self._next = -math.inf
        self._queue: dict[int, float] = {}
        self._best: list[int] = []
        self._best_score = 0.0

    def choose(self, adapter: int, now: float) -> int:
        if now >= self._next or len(self._queue) != len(self.fleet.loads):
            self._scrape(now)
        best, ranks = self._best_score, [*self._best]
        for rank in self.fleet.holders.get(adapter, ()):
            score = self._queue[rank] + self.AFFINITY
            if score > best:
                best, ranks = score, [rank]
            elif score == best:
                ranks.append(rank)
        return self.random.choice(ranks)

    def _scrape(self, now: float) -> None:
        self._next = now + self.SCRAPE_S
        replicas = self.fleet.replicas.values()
        shortest, longest = min(r.waiting for r in replicas), max(r.waiting for r in replicas)
        spread = longest - shortest
        self._queue = {r.rank: self.QUEUE * ((longest - r.waiting) / spread if spread else 1.0) for r in replicas}
        scores = {
            r.rank: self._queue[r.rank] + (0.8 * self.AFFINITY if len(r.device) < r.room.device else 0.0)
            for r in replicas
        }
        self._best_score = max(scores.values())
        self._best = [rank for rank, score in scores.items() if score == self._best_score]


class HaproxyRing(_Anywhere):
    """`hash-type consistent` on the adapter's name, `hash-balance-factor 125`: 16 points for each server on a ring; on
    along it while a server has its part of 1.25 times all requests under way."""

    POINTS = 16
    FACTOR = 1.25

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self._ranks: tuple[int, ...] = ()
        self._points: list[int] = []
        self._servers: list[int] = []

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        self._follow()
        return [self._servers[self._place(adapter)]]

    def choose(self, adapter: int, now: float) -> int:
        loads = self.fleet.loads
        self._follow()
        slots = math.ceil(self.FACTOR * (sum(loads.values()) + 1))
        each, more = divmod(slots, len(loads))
        place = self._place(adapter)
        while True:
            rank = self._servers[place % len(self._servers)]
            index = self._index[rank]
            mine = each + (index + 1) * more // len(loads) - index * more // len(loads)
            if loads[rank] < max(1, mine):
                return rank
            place += 1

    def _follow(self) -> None:
        """Make the ring anew if the fleet changed."""
        if len(self._ranks) == len(self.fleet.loads):
            return
        self._ranks = tuple(self.fleet.loads)
        self._index = {rank: index for index, rank in enumerate(self._ranks)}
        ring = sorted((_hash(f"{rank}:{number}"), rank) for rank in self._ranks for number in range(self.POINTS))
        self._points, self._servers = [point for point, _ in ring], [rank for _, rank in ring]

    def _place(self, adapter: int) -> int:
        return bisect(self._points, _hash(name(adapter))) % len(self._points)


class Rendezvous(_Anywhere):
    """One home for each adapter, and the bound of 1.25."""

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        return homes_of(adapter, len(self.fleet.loads), 1)

    def choose(self, adapter: int, now: float) -> int:
        return choose(name(adapter), self.fleet.loads, 1)


class RendezvousTopK(_Anywhere):
    """The server's: two homes, more for the popular, and the bound of 1.25."""

    least = LEAST_HOMES

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self._popularity = Popularity()
        self._usual_loads = dict.fromkeys(fleet.loads, USUAL_LOAD)

    def usual(self, adapter: int, share: float) -> Sequence[int]:
        return homes_of(adapter, len(self.fleet.loads), home_count(share, self._usual_loads, self.least))

    def recall(self, adapters: Sequence[int], times: Sequence[float]) -> None:
        for adapter, when in zip(adapters, times, strict=True):
            self._popularity.add(name(adapter), when)

    def choose(self, adapter: int, now: float) -> int:
        named, loads = name(adapter), self.fleet.loads
        self._popularity.add(named, now)
        return choose(named, loads, home_count(self._popularity.share(named), loads, self.least))


class RendezvousTopKFromOne(RendezvousTopK):
    """One home at least, as in the first plan."""

    least = 1


class OldLoads(RendezvousTopK):
    """The server's, with loads that are up to `age_s` old. adds: whether it counts what it sent since; for one of many
    routers that is so little as if it did not."""

    age_s = 0.5
    adds = False

    def __init__(self, fleet: Fleet, random: Random) -> None:
        super().__init__(fleet, random)
        self._next = -math.inf
        self._seen: dict[int, int] = {}

    def choose(self, adapter: int, now: float) -> int:
        if now >= self._next or len(self._seen) != len(self.fleet.loads):
            self._seen, self._next = dict(self.fleet.loads), now + self.age_s
        named = name(adapter)
        self._popularity.add(named, now)
        rank = choose(named, self._seen, home_count(self._popularity.share(named), self._seen))
        self._seen[rank] += self.adds
        return rank


class OlderLoads(OldLoads):
    age_s = 2.0


class OlderLoadsAndItsOwn(OlderLoads):
    adds = True


@cache
def homes_of(adapter: int, replicas: int, count: int) -> tuple[int, ...]:
    """The first homes of an adapter in an idle fleet of the ranks from 0."""
    return tuple(islice(preferences(name(adapter), dict.fromkeys(range(replicas), 0), 1), count))


def name(adapter: int) -> str:
    return f"adapter-{adapter}"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


OURS = "rendezvous, top-k from 2, bound 1.25"
ROUND_ROBIN, TWO_CHOICES = "round robin", "two choices (Ray's default)"
RAY_BOUNDED, LLM_D = "Ray multiplex, max_ongoing 48", "llm-d affinity + queue"
HAPROXY, ONE_HOME = "HAProxy, hash-balance-factor 125", "rendezvous, bound 1.25"
POLICIES: dict[str, Callable[[Fleet, Random], Policy]] = {
    ROUND_ROBIN: RoundRobin,
    TWO_CHOICES: TwoChoices,
    "Ray multiplex, unbounded": RayMultiplex,
    RAY_BOUNDED: RayMultiplexBounded,
    LLM_D: LlmD,
    HAPROXY: HaproxyRing,
    ONE_HOME: Rendezvous,
    "rendezvous, top-k from 1, bound 1.25": RendezvousTopKFromOne,
    OURS: RendezvousTopK,
}
OLD_LOADS: dict[str, Callable[[Fleet, Random], Policy]] = {
    "loads as they are": RendezvousTopK,
    "loads up to 0.5 s old": OldLoads,
    "loads up to 2 s old": OlderLoads,
    "loads up to 2 s old, and what it sent since": OlderLoadsAndItsOwn,
}
"""Ours, by what the router knows."""
