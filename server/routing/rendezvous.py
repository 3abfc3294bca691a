"""Owns which replica a request goes to: where its adapter lies already, unless that one is much busier than the rest.

Every adapter has its own order of all replicas (rendezvous hashing). Its homes are the first two of that order, or more
if it is popular. A request goes to the least busy home within the bound; if there is none, on along the order.

Invariant: the order depends on the adapter's name and the replicas' ranks alone, so every router, in every process,
finds the same; a replica that leaves or joins moves the adapters that it was, or becomes, a home of, and no others.
"""

import math
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import shake_128
from heapq import nlargest
from itertools import islice
from random import Random
from struct import unpack

BOUND = 1.25
"""How many times the mean load a replica may carry and still be chosen for what it holds."""
FREE_LOAD = 4
"""Requests that a replica may always have: an engine that runs so few at once is not busy."""
LEAST_HOMES = 2
"""With a second home a busy or a lost one costs no load: benchmarks/routing."""
HOMES_PER_SHARE = 4.0
"""Homes of an adapter whose requests alone would fill one replica."""
HALF_LIFE_S = 20.0
COUNTED_NAMES = 4096
CACHED_ORDERS = 8192
"""Each takes 4 bytes for every replica: 32 MiB for 1,000 replicas."""


def name_of(model: str) -> str:
    """NAME of NAME or NAME@version: every version has the homes of its name."""
    return model.partition("@")[0]


def choose(name: str, loads: Mapping[int, int], homes: int, bound: float = BOUND) -> int:
    """The replica for a request of the adapter `name`, within the bound: with this request it has at most FREE_LOAD, or
    `bound` times the mean with this request, rounded up. There always is such a replica.

    loads: the rank of every live replica -> its requests under way. A rank is a small integer that a replica keeps or
    hands on when it restarts, never a process id. homes: from `home_count`. Raises ValueError if `loads` is empty.
    """
    along, limit = _along(name, loads), _limit(loads, bound)
    best = min(islice(along, homes), key=loads.__getitem__)
    return best if loads[best] < limit else next(rank for rank in along if loads[rank] < limit)


def preferences(name: str, loads: Mapping[int, int], homes: int, bound: float = BOUND) -> Iterator[int]:
    """The replicas within the bound in the order in which `choose` would take them, were the ones before gone: for a
    router that tries one after the other."""
    along, limit = _along(name, loads), _limit(loads, bound)
    yield from sorted(filter(lambda rank: loads[rank] < limit, islice(along, homes)), key=loads.__getitem__)
    yield from filter(lambda rank: loads[rank] < limit, along)


def two_choices(loads: Mapping[int, int], random: Random) -> int:
    """A replica for a request of the base, which is everywhere: the less busy of two at random. Not for no replica."""
    ranks = tuple(loads)
    return min(random.sample(ranks, min(2, len(ranks))), key=loads.__getitem__)


def home_count(share: float, loads: Mapping[int, int], least: int = LEAST_HOMES) -> int:
    """How many homes an adapter has. share: its part of all requests, from `Popularity`.

    As many as its requests would fill replicas, HOMES_PER_SHARE times; in quiet hours no more than it has requests.
    """
    return max(least, math.ceil(HOMES_PER_SHARE * share * min(len(loads), sum(loads.values()))))


@lru_cache(CACHED_ORDERS)
def order(name: str, size: int) -> "array[int]":
    """The ranks 0 to size - 1 as the adapter `name` prefers them.

    Rank r's score is the r-th 8 bytes of SHAKE-128 of the name. A longer output begins with the shorter one, so a
    larger `size` inserts ranks and leaves the others in their order.
    """
    scores = unpack(f"<{size}Q", shake_128(name.encode()).digest(8 * size))
    return array("I", sorted(range(size), key=scores.__getitem__, reverse=True))


def _along(name: str, loads: Mapping[int, int]) -> Iterator[int]:
    """The live replicas in the adapter's order, which is made for a power of two, and seldom made anew."""
    if not loads:
        raise ValueError("found no live replica, expected at least one")
    return filter(loads.__contains__, order(name, 1 << max(loads).bit_length()))


def _limit(loads: Mapping[int, int], bound: float) -> int:
    """A replica with fewer requests is within the bound."""
    return max(FREE_LOAD, math.ceil(bound * (sum(loads.values()) + 1) / len(loads)))


class Popularity:
    """Each name's part of the requests of late: a count that halves every `half_life_s`.

    With 2 * `names` names it forgets the less popular half. Times are seconds of a clock that does not run backwards.
    Instead of every count shrinking as time goes by, what a request counts grows.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S, names: int = COUNTED_NAMES) -> None:
        self._half_life_s, self._most = half_life_s, names
        self._counts: dict[str, float] = {}
        self._total = 0.0
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, name: str | None, now: float) -> None:
        """Count a request; None: one of the base, which takes part in the total alone."""
        grown = (now - self._since) / self._half_life_s
        if grown > 64:
            self._shrink(2.0**-grown)
            self._since, grown = now, 0.0
        weight = 2.0**grown
        self._total += weight
        if name is not None:
            self._counts[name] = self._counts.get(name, 0.0) + weight
            if len(self._counts) > 2 * self._most:
                self._counts = dict(nlargest(self._most, self._counts.items(), key=lambda item: item[1]))

    def share(self, name: str) -> float:
        """Its part of all requests, 0 to 1; 0 for a name that is not remembered."""
        return self._counts.get(name, 0.0) / self._total if self._total else 0.0

    def _shrink(self, factor: float) -> None:
        self._total *= factor
        self._counts = {name: count * factor for name, count in self._counts.items()}
