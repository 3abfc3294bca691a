"""Which replica a request goes to (server/routing/rendezvous.py): homes stay, no replica is overfull."""

import math
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.routing import rendezvous
from server.routing.rendezvous import Popularity, choose, home_count, name_of, order, preferences, two_choices

ROOT = Path(__file__).parents[2]
NAMES = [f"adapter-{number}" for number in range(2000)]

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
fleets = st.dictionaries(st.integers(0, 40), st.integers(0, 60), min_size=1)


def idle(ranks: range) -> dict[int, int]:
    return dict.fromkeys(ranks, 0)


@given(names, fleets, st.integers(1, 50), st.floats(1, 3))
def test_no_replica_is_chosen_above_the_bound(name: str, loads: dict[int, int], homes: int, bound: float) -> None:
    found = list(preferences(name, loads, homes, bound))
    allowed = max(4, math.ceil(bound * (sum(loads.values()) + 1) / len(loads)))
    assert found and len(set(found)) == len(found)
    assert set(found) == {rank for rank, load in loads.items() if load + 1 <= allowed}
    assert choose(name, loads, homes, bound) == found[0]


def test_a_few_requests_make_nobody_too_busy() -> None:
    home, other = [*order("pirate", 8)][:2]
    assert choose("pirate", {**idle(range(8)), home: 3}, 1) == home
    assert choose("pirate", {**idle(range(8)), home: 4}, 1) == other


@given(names, fleets, st.integers(1, 50))
def test_the_least_busy_home_comes_first_then_the_order(name: str, loads: dict[int, int], homes: int) -> None:
    alive = [rank for rank in order(name, 64) if rank in loads]
    within = set(preferences(name, loads, homes))
    first = [rank for rank in alive[:homes] if rank in within]
    later = [rank for rank in alive[homes:] if rank in within]
    found = list(preferences(name, loads, homes))
    assert found[len(first) :] == later and sorted(found[: len(first)]) == sorted(first)
    assert [loads[rank] for rank in found[: len(first)]] == sorted(loads[rank] for rank in first)


@given(names, fleets, st.data())
def test_who_leaves_or_joins_changes_no_other_order(name: str, loads: dict[int, int], data: st.DataObject) -> None:
    """Also past a power of two, where longer orders are made."""
    everyone = [*preferences(name, dict.fromkeys(loads, 0), 1)]
    left = data.draw(st.sampled_from(everyone))
    others = {rank: 0 for rank in loads if rank != left}
    if others:
        assert [*preferences(name, others, 1)] == [rank for rank in everyone if rank != left]
    joined = data.draw(st.integers(0, 300).filter(lambda rank: rank not in loads))
    more = [*preferences(name, dict.fromkeys([*loads, joined], 0), 1)]
    assert [rank for rank in more if rank != joined] == everyone


@pytest.mark.parametrize("replicas", [10, 63, 64])
def test_one_of_n_homes_moves(replicas: int) -> None:
    before = {name: choose(name, idle(range(replicas)), 1) for name in NAMES}
    after = {name: choose(name, idle(range(replicas + 1)), 1) for name in NAMES}
    moved = [name for name in NAMES if before[name] != after[name]]
    assert {after[name] for name in moved} == {replicas}
    assert abs(len(moved) - len(NAMES) / (replicas + 1)) < 5 * math.sqrt(len(NAMES) / replicas)


def test_homes_are_spread_evenly() -> None:
    counts = [0] * 20
    for name in NAMES:
        for rank in [*preferences(name, idle(range(20)), 1)][:4]:
            counts[rank] += 1
    assert max(counts) < 1.3 * min(counts), counts


@given(names, st.integers(1, 10**6), fleets)
def test_a_version_goes_where_its_name_goes(name: str, version: int, loads: dict[int, int]) -> None:
    assert name_of(f"{name}@{version}") == name_of(name) == name
    assert choose(name_of(f"{name}@{version}"), loads, 2) == choose(name, loads, 2)


def test_every_process_finds_the_same() -> None:
    """Another order in a later release would move every adapter of a fleet while it is upgraded."""
    program = "from server.routing.rendezvous import order; print(*order('pirate', 8))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "5 3 4 1 2 6 0 7\n"


def test_without_a_replica_there_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no live replica"):
        choose("pirate", {}, 2)


@given(fleets, st.randoms(use_true_random=False))
def test_the_base_goes_to_the_less_busy_of_two(loads: dict[int, int], random: Random) -> None:
    chosen = two_choices(loads, random)
    assert chosen in loads
    assert len(loads) == 1 or loads[chosen] < max(loads.values()) or sorted(loads.values())[-2] == loads[chosen]


# --- popularity


def counted(requests: dict[str, int], half_life_s: float = 60.0) -> Popularity:
    popularity = Popularity(half_life_s)
    for name, count in requests.items():
        for _ in range(count):
            popularity.add(name, 0.0)
    return popularity


def test_homes_grow_with_popularity() -> None:
    popularity = counted({"hot": 500, "warm": 50, "cold": 1, "other": 449})
    busy = dict.fromkeys(range(100), 20)
    found = [home_count(popularity.share(name), busy) for name in ("hot", "warm", "cold", "unknown")]
    assert found == [200, 20, 2, 2]


def test_a_quiet_fleet_has_no_more_homes_than_requests() -> None:
    hot = counted({"hot": 5}).share("hot")
    assert home_count(hot, idle(range(100))) == 2
    assert home_count(hot, {**idle(range(100)), 3: 2}) == 8


@given(st.floats(0, 1), st.floats(0, 1), fleets)
def test_homes_are_monotonic_in_the_share(one: float, other: float, loads: dict[int, int]) -> None:
    assert home_count(min(one, other), loads) <= home_count(max(one, other), loads)


def test_a_count_halves() -> None:
    popularity = Popularity(half_life_s=10.0)
    for _ in range(8):
        popularity.add("old", 100.0)
    popularity.add("new", 130.0)
    assert popularity.share("old") == pytest.approx(popularity.share("new")) == pytest.approx(0.5)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e6)), max_size=50), st.floats(0.5, 1e4))
def test_shares_are_those_of_the_decayed_counts(waits: list[tuple[str, float]], half_life_s: float) -> None:
    """However long the gaps: what would overflow is scaled down."""
    popularity, now, exact = Popularity(half_life_s), 0.0, dict.fromkeys("abc", 0.0)
    for name, wait in waits:
        now += wait
        exact = {key: count * 2 ** (-wait / half_life_s) for key, count in exact.items()}
        exact[name] += 1
        popularity.add(name, now)
    total = sum(exact.values())
    for name, count in exact.items():
        assert popularity.share(name) == pytest.approx(count / total if total else 0.0, abs=1e-9)


def test_the_base_takes_part_in_the_total_alone() -> None:
    popularity = counted({"one": 1})
    popularity.add(None, 0.0)
    assert popularity.share("one") == 0.5 and len(popularity) == 1


def test_memory_is_bounded_and_the_popular_stay() -> None:
    popularity = Popularity(names=50)
    for number in range(10_000):
        popularity.add("hot", number * 0.001)
        popularity.add(f"once-{number}", number * 0.001)
        assert len(popularity) <= 100
    assert popularity.share("hot") == pytest.approx(0.5, rel=0.01)


def test_orders_are_kept_in_bounded_memory() -> None:
    assert order.cache_info().maxsize == rendezvous.CACHED_ORDERS
