"""Which replica a router chooses, from what replicas report: by the adapter's name, by load, by readiness."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.routing.choice import ReplicaChoice, ReplicaReport

BASE = "base"


def reports(count: int, number: int = 1, running: int = 0) -> dict[str, ReplicaReport | None]:
    return {f"replica-{rank}": ReplicaReport(number, rank, True, running) for rank in range(count)}


def choice() -> ReplicaChoice[str]:
    return ReplicaChoice([BASE], clock=lambda: 0.0, seed=0)


def first(model: str, replicas: dict[str, ReplicaReport | None]) -> str:
    return choice().choose(model, replicas)


def test_an_adapter_has_its_homes_in_every_router_and_its_versions_with_it() -> None:
    replicas = reports(20)
    homes = {f"adapter-{n}": first(f"adapter-{n}", replicas) for n in range(200)}
    assert len(set(homes.values())) == 20
    for name, home in homes.items():
        assert first(name, dict(reversed(replicas.items()))) == home == first(f"{name}@7", replicas)


def test_one_that_takes_the_rank_of_another_takes_its_adapters() -> None:
    before = reports(10)
    after = {("new" if key == "replica-3" else key): report for key, report in before.items()}
    for n in range(100):
        home = first(f"adapter-{n}", before)
        assert first(f"adapter-{n}", after) == ("new" if home == "replica-3" else home)


def test_a_replica_that_is_not_ready_or_said_nothing_yet_gets_none() -> None:
    replicas = reports(3)
    replicas["replica-1"] = ReplicaReport(1, 1, False, 0)
    replicas["replica-2"] = None
    one = choice()
    assert {one.choose(model, replicas) for model in ["a", "b", "c", BASE, 7, "No Name"] * 20} == {"replica-0"}


def test_where_none_is_ready_the_replicas_themselves_say_why() -> None:
    one = choice()
    silent: dict[str, ReplicaReport | None] = {"x": None, "y": None}
    assert {one.choose(BASE, silent) for _ in range(10)} == {"x", "y"}
    unready = {key: ReplicaReport(1, rank, False, 0) for rank, key in enumerate(("x", "y"))}
    assert one.choose("a", unready) in unready


def test_what_was_sent_counts_until_the_next_report() -> None:
    one, replicas = choice(), reports(4)
    sent = Counter(one.choose("hot", replicas) for _ in range(40))
    assert max(sent.values()) <= 14, "a bound of 1.25 times the mean, though one replica is its first home"
    replicas = reports(4, number=2)
    assert one.choose("hot", replicas) == first("hot", reports(4)), "all is done: the first home again"


def test_reported_load_sends_an_adapter_on() -> None:
    replicas = reports(10)
    home = first("poet", replicas)
    busy = replicas | {home: ReplicaReport(1, int(home.removeprefix("replica-")), True, 50)}
    assert first("poet", busy) != home


def test_two_of_one_rank_while_one_takes_over_share_its_requests() -> None:
    replicas: dict[str, ReplicaReport | None] = {
        "old": ReplicaReport(1, 0, True, 9),
        "new": ReplicaReport(1, 0, True, 0),
    }
    one = choice()
    assert [one.choose("poet", replicas) for _ in range(9)] == ["new"] * 9


def test_one_that_is_gone_is_forgotten() -> None:
    one, replicas = choice(), reports(50)
    for n in range(200):
        one.choose(f"adapter-{n}", replicas)
    alone = {"replica-0": replicas["replica-0"]}
    one.choose("adapter-1", alone)
    assert set(one._sent) == {"replica-0"}


def test_no_replica_is_an_error() -> None:
    for model in (BASE, "poet"):
        with pytest.raises(ValueError, match="found no live replica"):
            choice().choose(model, {})


@given(
    st.one_of(st.none(), st.integers(), st.text(), st.lists(st.text()), st.from_regex(r"[a-z@0-9]+", fullmatch=True)),
    st.integers(1, 8),
)
def test_whatever_a_request_says_it_goes_somewhere(model: object, count: int) -> None:
    replicas = reports(count)
    assert choice().choose(model, replicas) in replicas
