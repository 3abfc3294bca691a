"""Owns one run: a fleet warmed up, a policy, something that happens, and what came of it.

Before the run every replica holds what a long past would have left there. Measured is what comes after the event.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from time import perf_counter

import numpy as np

from benchmarks.routing.fleet import Fleet, Policy
from benchmarks.routing.machine import Machine
from benchmarks.routing.policies import OLD_LOADS, POLICIES
from benchmarks.routing.replica import DEVICE, STORE, Room
from benchmarks.routing.traffic import Floats, Ints, Traffic, drawn, poisson, traffic, zipf

WINDOW_S = 5.0
RECALLED = 50_000
RECOVERED = 1.25
ROOMY, TIGHT, SCARCE = Room(200, 500, 1000), Room(32, 200, 1000), Room(16, 40, 60)


@dataclass(frozen=True)
class Scenario:
    """What happens to a fleet. load: the part of all seats that is busy.

    event: kill, add (one of 100), shift (`part` of the ranking is permuted), flood (from then on `part` of the requests
    ask for one adapter that was unpopular), bursts (every 5 s a `part` of a second's requests more, at once, for one
    adapter), or none.
    """

    event: str
    part: float = 0.0
    replicas: int = 100
    adapters: int = 5000
    load: float = 0.7
    room: Room = ROOMY
    warm_s: float = 90.0
    before_s: float = 30.0
    after_s: float = 45.0
    history: int = 6000
    """Requests of the past for each replica."""

    @property
    def event_s(self) -> float:
        return self.warm_s + self.before_s

    @property
    def end_s(self) -> float:
        return self.event_s + self.after_s


def run(scenario: Scenario, machine: Machine, policy_name: str, seed: int) -> dict[str, float]:
    """Metric -> value. Every policy sees the same requests of a seed."""
    began = perf_counter()
    random = np.random.default_rng([seed, 11])
    shares = zipf(scenario.adapters)
    asked = requests_of(scenario, machine, shares, random)
    fleet = Fleet(scenario.replicas, machine, scenario.room, asked)
    policy = (POLICIES | OLD_LOADS)[policy_name](fleet, Random(seed))
    rate = machine.rate(scenario.load) * scenario.replicas
    past = drawn(np.random.default_rng([seed, 12]), shares, scenario.history * scenario.replicas)
    warm_up(fleet, policy, shares, past, rate, np.random.default_rng([seed, 13]))
    some = range(max(1, scenario.replicas // 100))
    happenings: dict[str, list[Callable[[], object]]] = {
        "kill": [partial(fleet.kill, rank, policy) for rank in some],
        "add": [fleet.add for _ in some],
    }
    fleet.run(policy, [(scenario.event_s, call) for call in happenings.get(scenario.event, [])], scenario.end_s)
    return {**figures(fleet, scenario), "wall_s": perf_counter() - began}


def requests_of(scenario: Scenario, machine: Machine, shares_A: Floats, random: np.random.Generator) -> Traffic:
    """The requests of a run; adapter 0 is the most popular before the event."""
    rate = machine.rate(scenario.load) * scenario.replicas
    arrivals = poisson(random, rate, 0.0, scenario.end_s)
    adapters = drawn(random, shares_A, len(arrivals))
    later = arrivals >= scenario.event_s
    if scenario.event == "shift":
        moved = random.random(len(shares_A)) < scenario.part
        order = np.arange(len(shares_A))
        order[moved] = random.permutation(order[moved])
        adapters[later] = order[adapters[later]]
    elif scenario.event == "flood":
        adapters[later & (random.random(len(arrivals)) < scenario.part)] = scenario.adapters // 2
    elif scenario.event == "bursts":
        count = int(scenario.part * rate)
        starts = np.repeat(np.arange(scenario.event_s, scenario.end_s - 1, 5.0), count)
        arrivals = np.concatenate([arrivals, starts + random.uniform(0, 0.2, len(starts))])
        bursting = np.repeat(random.integers(0, len(shares_A), len(starts) // count), count)
        adapters = np.concatenate([adapters, bursting])
    return traffic(random, arrivals, adapters, machine.prompt_tokens, machine.answer_tokens)


def warm_up(
    fleet: Fleet, policy: Policy, shares_A: Floats, past: Ints, rate: float, random: np.random.Generator
) -> None:
    """Fill the tiers with what the requests `past`, the last ones last, left on each replica; rate: per second."""
    usual = [policy.usual(adapter, share) for adapter, share in enumerate(shares_A.tolist())]
    counts_A = np.array([len(ranks) for ranks in usual])
    starts_A, flat = np.cumsum(counts_A) - counts_A, np.concatenate([np.asarray(ranks) for ranks in usual])
    where = flat[starts_A[past] + (random.random(len(past)) * counts_A[past]).astype(np.int64)]
    order = np.argsort(where, kind="stable")
    bounds = np.searchsorted(where[order], np.arange(len(fleet.replicas) + 1))
    for rank, replica in fleet.replicas.items():
        replica.fill(latest(past[order[bounds[rank] : bounds[rank + 1]]]))
        for adapter in replica.device:
            fleet.holders.setdefault(adapter, {})[rank] = None
    recent = past[-RECALLED:]
    policy.recall(recent.tolist(), (np.arange(-len(recent), 0) / rate).tolist())


def latest(adapters: Ints) -> list[int]:
    """Each adapter once, the last one first."""
    found, places = np.unique(adapters[::-1], return_index=True)
    return [int(adapter) for adapter in found[np.argsort(places)]]


def figures(fleet: Fleet, scenario: Scenario) -> dict[str, float]:
    """What came of a run after the event; times in seconds. A request without a first token at the end counts as if it
    came then. moved: how many more adapters were loaded than in as long a time before."""
    arrivals, event, end = fleet.traffic.arrivals, scenario.event_s, scenario.end_s
    ttft = np.minimum(np.nan_to_num(fleet.first, nan=end), end) - arrivals
    after = (arrivals >= event) & (arrivals < end - 1)
    p50, p99, p999 = np.percentile(ttft[after], (50, 99, 99.9))
    when_L, adapter_L, tier_L = (np.array(column) for column in zip(*fleet.loaded_at, (np.nan, 0, 0), strict=True))
    span = min(30.0, scenario.before_s, scenario.after_s)
    was, now = (
        len(np.unique(adapter_L[(when_L >= begin) & (when_L < begin + span)])) for begin in (event - span, event)
    )
    return {
        "hits": float((fleet.tier[after] == DEVICE).mean()),
        "fetches": float(((when_L >= event) & (tier_L == STORE)).sum() / (end - event)),
        "p50": float(p50), "p99": float(p99), "p99.9": float(p999),
        "max/mean": float(np.mean([most / mean for when, most, mean in fleet.sampled if when >= event and mean])),
        "moved": float(now - was),
        "recovery": recovery(arrivals, ttft, scenario),
        "lost": float(fleet.lost), "requests": float(len(arrivals)),
    }  # fmt: skip


def recovery(arrivals: Floats, ttft: Floats, scenario: Scenario) -> float:
    """Seconds from the event until p99, in windows of WINDOW_S, is for good as it was: at most RECOVERED times that of
    the worst window before. The time to the end of the run if it never is."""

    def p99(begin: float) -> float:
        chosen = ttft[(arrivals >= begin) & (arrivals < begin + WINDOW_S)]
        return float(np.percentile(chosen, 99)) if len(chosen) else 0.0

    usual = max(p99(begin) for begin in np.arange(scenario.warm_s, scenario.event_s, WINDOW_S).tolist())
    windows = np.arange(scenario.event_s, scenario.end_s, WINDOW_S).tolist()
    late = [begin for begin in windows if p99(begin) > RECOVERED * usual]
    return float(late[-1] + WINDOW_S - scenario.event_s) if late else 0.0
