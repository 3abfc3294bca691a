"""The simulated fleet (benchmarks/routing) keeps its rules and queues as theory says. No figure of it is tested."""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.common.report import Report
from benchmarks.routing import __main__ as benchmark
from benchmarks.routing.fleet import Fleet
from benchmarks.routing.machine import Machine, demo, gpu, measure_fetch
from benchmarks.routing.policies import HAPROXY, LLM_D, OURS, POLICIES, ROUND_ROBIN
from benchmarks.routing.replica import DISK, HOST, STORE, Replica, Room
from benchmarks.routing.simulate import Scenario, latest, recovery, requests_of, run
from benchmarks.routing.traffic import Traffic, drawn, poisson, traffic, zipf

MACHINE = Machine(
    seats=4, step_s=0.01, step_per_request_s=0.001, prefill_s=0.02, prefill_per_token_s=0.0001,
    fetch_s=0.3, read_s=0.05, place_s=0.01, prompt_tokens=100, answer_tokens=20,
)  # fmt: skip
SMALL = Room(device=4, host=6, disk=8)


def asked(seconds: float = 60, rate: float = 40, adapters: int = 20, seed: int = 0) -> Traffic:
    random = np.random.default_rng(seed)
    arrivals = poisson(random, rate, 0, seconds)
    return traffic(random, arrivals, drawn(random, zipf(adapters), len(arrivals)), 100, 20)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_no_request_is_forgotten_and_no_replica_overfull(policy_name: str) -> None:
    """While replicas come and go, with so little room that adapters in use fill the device."""
    fleet = Fleet(4, MACHINE, SMALL, asked())
    policy = POLICIES[policy_name](fleet, Random(0))

    def check() -> None:
        under_way = 0
        for rank, replica in fleet.replicas.items():
            waiting = len(replica.for_seat) + len(replica.for_room) + sum(map(len, replica.loading.values()))
            assert replica.running + waiting == fleet.loads[rank]
            assert replica.running <= 4 and len(replica.device) <= 4 and len(replica.host) <= 6
            assert {adapter for adapter, users in replica.users.items() if users} <= set(replica.device)
            under_way += fleet.loads[rank]
            assert all(rank in fleet.holders[adapter] for adapter in replica.device)
        assert sum(map(len, fleet.holders.values())) == sum(len(r.device) for r in fleet.replicas.values())
        checked.append(under_way)

    checked: list[int] = []
    changes = [(20.0, lambda: fleet.kill(2, policy)), (30.0, fleet.add), (40.0, lambda: fleet.kill(0, policy))]
    fleet.run(policy, [*changes, *((second + 0.5, check) for second in range(200))], 200.0)
    assert len(checked) == 200 and max(checked) > 0 and checked[-1] == 0
    assert set(fleet.loads) == {1, 3, 4} and fleet.lost > 0
    assert not np.isnan(fleet.first).any() and (fleet.tier >= 0).all()
    assert (fleet.first > fleet.traffic.arrivals).all()


@pytest.mark.parametrize(("seats", "load"), [(1, 0.5), (4, 0.8)])
def test_it_queues_as_theory_says(seats: int, load: float) -> None:
    """Erlang's formula for the mean wait of a queue with `seats` servers (M/M/c)."""
    machine = Machine(seats, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 100)
    service = 1.0
    random = np.random.default_rng(3)
    arrivals = poisson(random, load * seats / service, 0, 100_000)
    given = traffic(random, arrivals, np.zeros(len(arrivals), np.int64), 1, 100)
    fleet = Fleet(1, machine, SMALL, given)
    fleet.run(POLICIES[ROUND_ROBIN](fleet, Random(0)), [], 200_000)
    offered = load * seats
    busy = offered**seats / math.factorial(seats) / (1 - load)
    all_busy = busy / (busy + sum(offered**k / math.factorial(k) for k in range(seats)))
    expected = all_busy * service / (seats * (1 - load))
    assert np.mean(fleet.first - arrivals) - machine.step(1) == pytest.approx(expected, rel=0.05)


def test_an_adapter_comes_from_the_nearest_tier() -> None:
    replica = Replica(0, MACHINE, Room(device=1, host=2, disk=3))
    assert replica.load(1, 0.0) == (STORE, pytest.approx(0.36))
    assert replica.load(1, 1.0) == (HOST, pytest.approx(1.01))
    assert [replica.load(adapter, 2.0)[0] for adapter in (2, 3)] == [STORE, STORE]  # the host has 2 and 3
    assert replica.load(1, 10.0) == (DISK, pytest.approx(10.06))
    assert replica.load(4, 11.0)[0] == STORE  # and 2, used least recently, leaves the disk
    assert replica.load(2, 12.0)[0] == STORE


def test_moves_wait_for_their_threads() -> None:
    replica = Replica(0, MACHINE, Room(8, 8, 8))
    assert [replica.load(adapter, 0.0)[1] for adapter in range(5)] == pytest.approx([0.36] * 4 + [0.66])
    replica.fill([7, 6, 5])
    assert [replica.load(adapter, 1.0)[1] for adapter in (5, 6)] == pytest.approx([1.01, 1.02])
    assert [*replica.device] == [5, 6, 7]


def test_waiters_of_a_killed_replica_go_to_another() -> None:
    random = np.random.default_rng(0)
    given = traffic(random, np.full(20, 0.5), np.zeros(20, np.int64), 100, 2000)
    fleet = Fleet(2, MACHINE, SMALL, given)
    policy = POLICIES[ROUND_ROBIN](fleet, Random(0))
    fleet.run(policy, [(1.0, lambda: fleet.kill(0, policy))], 10_000.0)
    assert fleet.lost == 4 and not np.isnan(fleet.first).any()


def test_a_run_is_the_same_again() -> None:
    for policy in POLICIES:
        one, again = (run(benchmark.TINY, MACHINE, policy, 5) for _ in range(2))
        assert {**one, "wall_s": 0} == {**again, "wall_s": 0}
    assert run(benchmark.TINY, MACHINE, OURS, 5)["p99"] != run(benchmark.TINY, MACHINE, OURS, 6)["p99"]


def test_every_policy_sees_the_same_requests() -> None:
    assert len({run(benchmark.TINY, MACHINE, policy, 1)["requests"] for policy in POLICIES}) == 1


def counts(scenario: Scenario) -> tuple[np.ndarray, np.ndarray]:
    """Requests of each adapter, before the event and after it."""
    given = requests_of(scenario, MACHINE, zipf(scenario.adapters), np.random.default_rng(1))
    adapters, late = np.array(given.adapters), given.arrivals >= scenario.event_s
    assert (np.diff(given.arrivals) >= 0).all()
    before, after = (np.bincount(adapters[chosen], minlength=scenario.adapters) for chosen in (~late, late))
    return before, after


def test_what_happens_to_popularity() -> None:
    few = {"replicas": 10, "adapters": 50}
    for event in ("kill", "add", "none"):
        assert all(np.argmax(count) == 0 for count in counts(Scenario(event, **few)))
    before, after = counts(Scenario("shift", 1.0, **few))
    assert np.argmax(before) == 0 and np.argmax(after) != 0
    before, after = counts(Scenario("flood", 0.3, **few))
    assert np.argmax(before) == 0 and np.argmax(after) == 25 and after[25] / after.sum() == pytest.approx(0.3, abs=0.03)
    assert counts(Scenario("bursts", 1.0, **few))[1].sum() > 1.1 * counts(Scenario("none", **few))[1].sum()


def test_the_load_is_what_was_asked_for() -> None:
    scenario = Scenario("none", replicas=20, adapters=20, warm_s=30, before_s=30, after_s=60)
    given = requests_of(scenario, MACHINE, zipf(20), np.random.default_rng(0))
    fleet = Fleet(20, MACHINE, Room(20, 20, 20), given)
    fleet.run(POLICIES["two choices (Ray's default)"](fleet, Random(0)), [], scenario.end_s)
    running = np.mean([mean for when, _, mean in fleet.sampled if when > 30])
    assert running / MACHINE.seats == pytest.approx(0.7, abs=0.1)


def idle_fleet(replicas: int) -> Fleet:
    return Fleet(replicas, MACHINE, SMALL, asked(1))


def test_haproxy_keeps_a_home_until_it_is_full() -> None:
    fleet = idle_fleet(10)
    policy = POLICIES[HAPROXY](fleet, Random(0))
    home = policy.choose(3, 0.0)
    assert [policy.choose(3, 0.0) for _ in range(5)] == [home] * 5 == [*policy.usual(3, 0.1)] * 5
    fleet.loads = dict.fromkeys(fleet.loads, 8)
    for _ in range(30):
        fleet.loads[policy.choose(3, 0.0)] += 1
        assert max(fleet.loads.values()) <= math.ceil(1.25 * sum(fleet.loads.values()) / 10)
    fleet.loads = dict.fromkeys(range(10), 8)
    before = [policy.choose(adapter, 0.0) for adapter in range(200)]
    fleet.loads = dict.fromkeys(range(11), 8)
    after = [policy.choose(adapter, 0.0) for adapter in range(200)]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {10} and len(moved) < 50


def test_affinity_goes_where_the_adapter_is() -> None:
    for name in ("Ray multiplex, unbounded", LLM_D):
        fleet = idle_fleet(10)
        fleet.holders[3] = {7: None}
        assert {POLICIES[name](fleet, Random(0)).choose(3, 0.0) for _ in range(20)} == {7}
    fleet.loads[7] = 1000
    assert POLICIES["Ray multiplex, unbounded"](fleet, Random(0)).choose(3, 0.0) == 7
    assert POLICIES["Ray multiplex, max_ongoing 48"](fleet, Random(0)).choose(3, 0.0) != 7
    fleet.replicas[7].for_seat.extend(range(5))
    assert POLICIES[LLM_D](fleet, Random(0)).choose(3, 0.0) != 7


def test_round_robin_takes_turns() -> None:
    fleet = idle_fleet(3)
    policy = POLICIES[ROUND_ROBIN](fleet, Random(0))
    assert sorted(policy.choose(0, 0.0) for _ in range(6)) == [0, 0, 1, 1, 2, 2]


def test_the_latest_come_first() -> None:
    assert latest(np.array([1, 2, 1, 3, 2, 2])) == [2, 3, 1]


@pytest.mark.parametrize(("late", "expected"), [((), 0.0), ((0, 1), 10.0), ((1,), 10.0), ((0, 3), 20.0)])
def test_recovery_is_from_when_it_is_good_for_good(late: Sequence[int], expected: float) -> None:
    scenario = Scenario("kill", warm_s=10, before_s=20, after_s=20)
    arrivals = np.arange(0, 50, 0.01)
    ttft = np.ones(len(arrivals))
    for window in late:
        ttft[(arrivals >= 30 + 5 * window) & (arrivals < 35 + 5 * window)] = 2.0
    assert recovery(arrivals, ttft, scenario) == expected


def test_the_benchmark_tells_what_it_found(tmp_path: Path) -> None:
    report = Report("routing", argparse.Namespace(output=tmp_path, quick=True, base=None))
    fetches = {"demo": measure_fetch(4, 2), "gpu": [0.05]}
    assert min(fetches["demo"]) > 0
    machines = {"demo": demo(fetches["demo"][0]), "gpu": gpu(0.05)}
    assert all(1 < machine.rate(0.5) < machine.rate(1.0) for machine in machines.values())
    benchmark.tell_machines(report, machines, fetches)
    with ThreadPoolExecutor(1) as pool:
        runs = {name: benchmark.simulate(name, machines["gpu"], 2, pool, benchmark.TINY) for name in ("kill", "large")}
    for name, found in runs.items():
        benchmark.tell(report, name, name, found)
    benchmark.tell_times(report, runs)
    assert report.write() is not None
    assert len(report.tables["kill"]) == 1 + len(POLICIES) and len(report.tables["large"]) == 5
    assert len(report.comparisons) == len(POLICIES) - 1 + 3
