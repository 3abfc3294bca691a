"""The residency scheduler when the engine is full and when a herd comes: turns of adapters, and of keys, in virtual
time; `World.check` runs after every round of the loop."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest

from adapters.ref import AdapterRef
from server.residency.allocation import PATIENCE_S
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import GRACE_S, Need
from server.residency.waiting import TURN_S
from tests.server.residency_world import UNIT, Request, World, write_sizes
from tests.server.virtual_time import run_virtually

MOVES_S = 0.25
"""Seconds of all the moves that put one adapter in the place of another, in these worlds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    write_sizes(folder)
    return folder


def play(folder: Path, scenario: Callable[[World], Coroutine[Any, Any, None]], **options: Any) -> World:
    worlds: list[World] = []

    async def main() -> World:
        worlds.append(World(folder, **options))
        await scenario(worlds[0])
        await worlds[0].leave_nothing()
        return worlds[0]

    return run_virtually(main(), lambda: worlds[0].check() if worlds else None)


def p95(requests: list[Request]) -> float:
    return quantiles((request.ended - request.asked for request in requests), n=20)[-1]


def herd(folder: Path, is_sorted: bool, seconds: float, pause: float = 0.0, **options: Any) -> tuple[float, float, int]:
    """300 requests on three adapters, with a place for one: makespan, p95 in seconds, evictions."""
    seen: list[tuple[float, float, int]] = []

    async def scenario(world: World) -> None:
        adapters = [world.add(name) for name in "abc"]
        order = [adapters[number * 3 // 300 if is_sorted else number % 3] for number in range(300)]
        began = world.loop.time()
        for number, adapter in enumerate(order):
            world.ask(adapter, seconds, timeout_s=60)
            if number % 10 == 9:
                await asyncio.sleep(pause)
        await world.end(*world.requests)
        assert all(request.error is None for request in world.requests)
        seen.append((world.loop.time() - began, p95(world.requests), world.events.evictions["device"]))

    play(folder, scenario, units=1, prepare=0.05, place=0.05, **options)
    return seen[0]


@pytest.mark.parametrize("running", [1, 100])
@pytest.mark.parametrize(
    ("seconds", "sequences", "pause"),
    [(0.1, None, 0), (1.0, None, 0.01), (0.1, 16, 0.01), (0.1, 16, 0), (0.02, 8, 0), (1.0, 64, 0.01), (1.0, 16, 0.01)],
)
def test_a_herd_is_served_by_turns(
    folder: Path, seconds: float, sequences: int | None, pause: float, running: int
) -> None:
    options: dict[str, Any] = {"sequences": sequences, "running": running, "pause": pause}
    makespan, slow, evictions = herd(folder, False, seconds, **options)
    sorted_makespan, sorted_slow, _ = herd(folder, True, seconds, **options)
    assert slow <= 1.5 * sorted_slow and makespan <= 1.5 * sorted_makespan
    assert evictions <= 3 + makespan / TURN_S


@pytest.mark.parametrize("sequences", [None, 8])
def test_a_herd_that_shares_the_step_is_served_by_turns(folder: Path, sequences: int | None) -> None:
    """All are on the device, but one step takes only one of them."""

    async def scenario(world: World) -> None:
        adapters = [world.add(name) for name in "abc"]
        await world.use(*adapters)
        requests = [world.ask(adapters[number % 3], 0.1, timeout_s=60) for number in range(150)]
        began = world.loop.time()
        await world.end(*requests)
        assert all(request.error is None for request in requests)
        batches = 1 if sequences is None else 50 / sequences + 1
        assert world.loop.time() - began <= 3 * (batches * 0.1 + PATIENCE_S)

    play(folder, scenario, running=1, sequences=sequences)


def test_those_that_keep_coming_do_not_keep_an_adapter_for_ever(folder: Path) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        flood = [world.ask(a, 0.5, label="flood") for _ in range(400)]
        more = world.keep_asking(a, 0.5, 0.05)
        await asyncio.sleep(1)
        other = world.ask(b, 0.1, label="other")
        await world.end(other)
        more.cancel()
        assert other.waited <= PATIENCE_S + TURN_S + 0.5 + GRACE_S + MOVES_S
        assert sum(not request.is_admitted for request in flood) > 100
        await world.end(*flood)

    play(folder, scenario, units=1, sequences=4, prepare=0.05, place=0.05)


def test_an_adapter_whose_requests_wait_for_a_sequence_gives_way(folder: Path) -> None:
    """The engine is full of the base; requests of one key wait there for their adapter's turn to run, idle on the
    device. Another key's adapter gets its place, and its request the next sequence that is free."""

    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.use(a)
        for _ in range(20):
            world.ask(None, 1.0, label="flood")
            world.ask(a, 1.0, label="flood")
        await asyncio.sleep(0.1)
        other = world.ask(b, 0.1, label="other")
        await world.end(other)
        assert other.waited <= PATIENCE_S + TURN_S + GRACE_S + 1.0 + MOVES_S + 1.0
        await world.end(*world.requests)

    play(folder, scenario, units=1, sequences=4, prepare=0.05, place=0.05)


@pytest.mark.parametrize("is_base", [True, False])
@pytest.mark.parametrize("sequences", [1, 8])
def test_a_key_that_fills_the_engine_makes_another_wait_for_one_sequence(
    folder: Path, is_base: bool, sequences: int
) -> None:
    async def scenario(world: World) -> None:
        a = None if is_base else world.add("a")
        if a is not None:
            await world.use(a)
        flood = [world.ask(a, 1.0, label="flood") for _ in range(500)]
        for _ in range(5):
            await asyncio.sleep(1.3)
            others = [world.ask(adapter, 0.1, label="other") for adapter in (a, None)]
            await world.end(*others)
            assert max(other.waited for other in others) <= (1.0 if sequences > 1 else 2.2) + 0.01
        assert sum(not request.is_admitted for request in flood) > 100
        for request in flood:
            world.cancel(request)

    play(folder, scenario, sequences=sequences)


@pytest.mark.parametrize("is_base", [True, False])
def test_a_few_sequences_are_kept_for_keys_that_have_none(folder: Path, is_base: bool) -> None:
    async def scenario(world: World) -> None:
        a = None if is_base else world.add("a")
        if a is not None:
            await world.use(a)
        for _ in range(300):
            world.ask(a, 10.0, label="flood")
        await asyncio.sleep(1)
        assert sum(request.label == "flood" and request.is_admitted for request in world.requests) == 30
        first, second = world.ask(a, 0.5, label="other"), world.ask(None, 0.5, label="third")
        await world.end(first, second)
        assert first.waited == second.waited == 0
        without_keys = [world.ask(a, 1.0) for _ in range(2)]
        await world.end(*without_keys)
        assert all(request.waited == 0 for request in without_keys), "they are one key"

    play(folder, scenario, sequences=32)


def test_keys_share_the_sequences(folder: Path) -> None:
    async def scenario(world: World) -> None:
        for label in ("many", "some", "few"):
            for _ in range({"many": 300, "some": 60, "few": 12}[label]):
                world.ask(None, 1.0, label=label)
        await asyncio.sleep(4.5)
        running = {
            label: sum(r.label == label and r.is_admitted for r in world.requests) for label in ("many", "some", "few")
        }
        assert running["few"] == 12 and abs(running["many"] - running["some"]) <= 24 and sum(running.values()) == 60
        await world.end(*world.requests)

    play(folder, scenario, sequences=12)


def test_within_a_key_first_come_is_first_served(folder: Path) -> None:
    async def scenario(world: World) -> None:
        requests = [world.ask(None, 0.1, label="one") for _ in range(50)]
        await world.end(*requests)
        assert [r.began for r in requests] == sorted(r.began for r in requests)

    play(folder, scenario, sequences=3)


def test_who_leaves_a_full_engine_takes_nobodys_turn(folder: Path) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")
        await world.use(a)
        running = [world.ask(None, 5.0, label="x") for _ in range(2)]
        waiting = [world.ask(adapter, 0.1, label="x") for adapter in (a, None) * 20]
        await asyncio.sleep(1)
        assert world.scheduler.requests_waiting(a) == 20 and world.scheduler.base_waiting() == 20
        for request in waiting[:-2]:
            world.cancel(request)
        await asyncio.sleep(0.1)
        assert world.scheduler.requests_waiting(a) == 1 and world.scheduler.base_waiting() == 1
        await world.end(*running, *waiting[-2:])
        assert all(request.is_admitted for request in waiting[-2:])

    play(folder, scenario, sequences=2)


def test_a_full_engine_is_no_reason_to_refuse(folder: Path) -> None:
    """The time limit is for loading an adapter, not for other requests to end."""

    async def scenario(world: World) -> None:
        a = world.add("a")
        await world.use(a)
        world.ask(None, 30.0)
        waiting = world.ask(a, 1.0, timeout_s=2.0)
        await world.end(waiting)
        assert waiting.error is None and waiting.waited > 29

    play(folder, scenario, sequences=1)


def test_an_engine_that_does_not_answer_is_not_called_too_small(folder: Path) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        world.scheduler._engine_problem = lambda: "the engine has not answered for 60 s"
        await world.scheduler.load(b)
        world.ask(a, 10.0)
        late = world.ask(b, 1.0, timeout_s=1.0)
        await world.end(late)
        assert late.error is not None and late.error.code == "engine_unavailable"
        assert "has not answered" in late.error.message and "pool" not in late.error.message
        world.engine.failures["prepare", "c@3"] = 1
        failed = world.ask(world.add("c"), 1.0)
        await world.end(failed)
        assert failed.error is not None and failed.error.code == "engine_unavailable"

    play(folder, scenario, units=1, place=0.05)


class CountingResidents(dict[str, Any]):
    """All residents that are known; counts how often somebody walks over them."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()


def test_an_event_costs_what_is_loaded_not_what_is_known(folder: Path) -> None:
    """With many versions known and eight on the device, no event walks over those that are known."""

    async def main() -> int:
        world = World(folder, units=8, host=16)
        scheduler: ResidencyScheduler = world.scheduler
        adapters = [world.add(f"a{number}") for number in range(20)]
        need = Need(UNIT, 0, 100)
        for number in range(1000, 21_000):
            scheduler.add(AdapterRef(f"k{number}@1", number, "PERFT", f"k{number}", folder / "1"), need)
        known = CountingResidents(scheduler._residents)
        scheduler._residents = known
        await scheduler.pin(adapters[0])
        for _ in range(3):
            for adapter in adapters:
                world.ask(adapter, 0.1)
            await world.end(*world.requests)
        await scheduler.load(adapters[5])
        scheduler.unpin(adapters[0])
        assert scheduler.rows_used <= 8 * UNIT and world.events.evictions["device"] > 12
        assert world.events.evictions["host"] > 0
        await scheduler.remove(adapters[7])
        return known.walks

    assert run_virtually(main()) == 0


def test_the_sets_of_what_is_loaded_are_checked(folder: Path) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")
        await world.use(a)
        resident = world.scheduler.resident(a.key)
        assert resident is not None
        object.__setattr__(resident, "on_host", False)  # behind the back of the sets
        with pytest.raises(AssertionError, match="on_host"):
            world.scheduler.check_integrity()
        object.__setattr__(resident, "on_host", True)

    play(folder, scenario)


@pytest.mark.parametrize("moment", [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65])
def test_what_is_activated_while_its_content_leaves_is_there(folder: Path, moment: float) -> None:
    """The last owner is removed, and the same content comes again while the device and the host are freed."""

    async def scenario(world: World) -> None:
        first = world.add("first", content="same")
        await world.use(first)
        removal = asyncio.create_task(world.scheduler.remove(first))
        await asyncio.sleep(moment)
        second = world.add("second", content="same")
        await world.scheduler.load(second)
        for _ in range(20):
            assert second.key in world.engine.on_host, "activated, and not on the host"
            assert world.scheduler.tier(second) != "disk"
            await asyncio.sleep(0.1)
        await removal
        await world.use(second)

    play(folder, scenario, evict=0.3, drop=0.3, prepare=0.05, place=0.05)
