"""The residency scheduler, rule by rule, on the fake engine in virtual time; `World.check` runs after every round of
the loop."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters.ref import AdapterRef
from server.api.error_responses import as_api_error
from server.errors import EngineUnavailableError, ServerError
from server.residency.allocation import PATIENCE_S
from server.residency.scheduler import RETRY_FAILED_S
from server.residency.state import GRACE_S
from tests.server.residency_world import UNIT, Request, World, write_sizes
from tests.server.virtual_time import run_virtually

Scenario = Callable[[World], Coroutine[Any, Any, None]]
Play = Callable[..., World]
SOON = 0.05
"""More than the scheduler's timers add, less than anything a test tells apart."""


@pytest.fixture(scope="session")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    write_sizes(folder)
    return folder


@pytest.fixture
def play(sizes: Path) -> Play:
    """Play a scenario in a world of these options; at its end nothing may be left behind."""

    def run(scenario: Scenario, **options: Any) -> World:
        worlds: list[World] = []

        async def main() -> World:
            worlds.append(World(sizes, **options))
            await scenario(worlds[0])
            await worlds[0].leave_nothing()
            return worlds[0]

        return run_virtually(main(), lambda: worlds[0].check() if worlds else None)

    return run


async def refused(world: World, request: Request, status: int, code: str) -> ServerError:
    """Wait for its refusal."""
    await world.end(request)
    assert request.error is not None and not request.is_admitted
    error = as_api_error(request.error, field="model")
    assert (error.status, error.code, error.param) == (status, code, "model")
    return request.error


def held_up_by(world: World, waiting: Request) -> set[AdapterRef]:
    """The adapters that were closed for a request, now let in, when its patience was over."""
    since = (r for r in world.requests if waiting.asked + PATIENCE_S + SOON < r.asked < waiting.began)
    return {request.adapter for request in since if request.began != request.asked}


# What is taken, and from whom


def test_the_least_recently_used_idle_adapter_leaves(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c, d = (world.add(name) for name in "abcd")
        await world.use(a, b, c, a)
        assert world.tiers(a, b, c, d) == "dddx"
        await world.use(d)
        assert world.tiers(a, b, c, d) == "dhdd" and world.events.evictions == {"device": 1}

    play(scenario)


def test_a_long_request_counts_to_its_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        long = world.ask(a, 5)
        await asyncio.sleep(1)
        await world.use(b)
        await world.end(long)
        await world.use(c)
        assert world.tiers(a, b, c) == "dhd"

    play(scenario, units=2)


def test_an_adapter_that_runs_or_is_pinned_stays(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c, d = (world.add(name) for name in "abcd")
        await world.use(a, b, c)
        await world.scheduler.pin(a)
        running = world.ask(b, 60)
        await world.use(d, c, d, c)
        assert world.tiers(a, b) == "dd" and running.ended < 0
        assert world.engine.count("prepare") == 4

    play(scenario)


def test_promised_rows_never_exceed_the_pool(play: Play) -> None:
    async def scenario(world: World) -> None:
        two, other_two, one = world.add("two", 2), world.add("other-two", 2), world.add("one", 1)
        first, second, third = world.ask(two), world.ask(other_two), world.ask(one)
        await asyncio.sleep(2.5)
        assert first.is_admitted and third.is_admitted and not second.is_admitted
        assert world.scheduler.rows_used == 3 * UNIT
        await world.end(second)
        assert second.is_admitted and world.engine.most_rows == 3 * UNIT

    play(scenario, place=2)


def test_rows_rest_for_a_moment_after_the_last_request(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.scheduler.load(b)
        first = world.ask(a, 1)
        await asyncio.sleep(0.99)
        second = world.ask(b)
        await world.end(second)
        assert first.ended + GRACE_S <= second.began < first.ended + GRACE_S + SOON

    play(scenario, units=1)


def test_who_asks_during_that_moment_does_not_wait_for_the_end_of_patience(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.scheduler.load(b)
        await world.end(world.ask(a, 1))
        again, other = world.ask(a, 0), world.ask(b)
        await world.end(again, other)
        assert again.waited == 0 and GRACE_S <= other.waited < GRACE_S + SOON

    play(scenario, units=1)


def test_what_leaves_does_not_come_back_before_it_has_left(play: Play) -> None:
    async def scenario(world: World) -> None:
        leaving, other, coming = world.add("leaving"), world.add("other"), world.add("coming")
        await world.use(leaving)
        world.ask(other, 1)
        await asyncio.sleep(2.5)
        first = world.ask(coming)
        await asyncio.sleep(0.1)
        back = world.ask(leaving)
        await world.end(first, back)
        assert first.waited == pytest.approx(2, abs=SOON) and back.began >= first.began + 2

    play(scenario, units=2, place=2)


# Who waits for whom


def test_a_ready_adapter_waits_for_no_load(play: Play) -> None:
    async def scenario(world: World) -> None:
        hot, cold, another = world.add("hot"), world.add("cold"), world.add("another")
        await world.use(hot)
        slow = world.ask(cold)
        await asyncio.sleep(1)
        ready = world.ask(hot)
        world.engine.delays["prepare"] = 0.1
        quick = world.ask(another)
        await world.end(slow)
        assert ready.waited == 0 and quick.waited < 0.5 and slow.waited == pytest.approx(5, abs=SOON)

    play(scenario, prepare=5)


def test_one_read_serves_all_who_wait(play: Play) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")
        requests = [world.ask(a, timeout_s=5) for _ in range(20)]
        await asyncio.sleep(0.5)
        assert world.scheduler.requests_waiting(a) == 20 and world.scheduler.tier(a) == "disk"
        await world.end(*requests)
        assert all(request.is_admitted for request in requests) and world.scheduler.requests_waiting(a) == 0
        assert world.calls("prepare", "place") == [("prepare", "a@1"), ("place", "a@1")]
        assert world.events.loads == {("host", "ok"): 1, ("device", "ok"): 1}

    play(scenario, prepare=1, place=1)


def test_hot_adapters_do_not_keep_another_one_out(play: Play) -> None:
    async def scenario(world: World) -> None:
        hot = [world.add(name) for name in "abc"]
        await world.use(*hot)
        for adapter in hot:
            world.keep_asking(adapter, every=0.3)
        await asyncio.sleep(10)
        cold = world.ask(world.add("cold"))
        await world.end(cold)
        assert PATIENCE_S <= cold.waited <= PATIENCE_S + 1 + GRACE_S + SOON
        assert len(held_up_by(world, cold)) == 1, "no more are closed than is needed"

    play(scenario)


def test_a_large_adapter_gets_in_among_small_ones(play: Play) -> None:
    async def scenario(world: World) -> None:
        for name in "abcdefgh":
            world.keep_asking(world.add(name))
        large = world.add("large", 4)
        await asyncio.sleep(5)
        request = world.ask(large)
        await world.end(request)
        ahead = 8  # each at most its patience, a load, a request and the grace
        assert request.waited < ahead * (PATIENCE_S + 1 + GRACE_S + SOON)
        await asyncio.sleep(10)
        ended = [r for r in world.requests if r.asked < request.ended]
        assert all(r.ended >= 0 for r in ended)

    play(scenario, units=4)


def test_those_whose_patience_is_over_are_served_side_by_side(play: Play) -> None:
    async def scenario(world: World) -> None:
        hot = [world.add(name) for name in "abc"]
        for adapter in hot:
            world.keep_asking(adapter, 5, 2)
        await asyncio.sleep(10)
        cold = [world.ask(world.add(name), 5) for name in "def"]
        await world.end(*cold)
        assert max(request.waited for request in cold) <= PATIENCE_S + 5 + GRACE_S + SOON

    play(scenario)


def test_for_a_while_a_later_one_may_pass_and_then_nobody(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        large, first, second = world.add("large", 3), world.add("first"), world.add("second")
        await world.use(a, b)
        running = world.ask(a, 5)
        waiting = world.ask(large)
        await asyncio.sleep(0.1)
        passing = world.ask(first, 0)
        await asyncio.sleep(1)
        held_up = world.ask(second)
        await world.end(held_up)
        assert passing.waited == 0 and waiting.began >= running.ended and held_up.began >= waiting.ended

    play(scenario)


def test_nobody_passes_either_while_others_are_on_the_move(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.ask(world.add("a"), 10)
        await asyncio.sleep(5)
        moving = world.ask(world.add("moving"), 0)
        large = world.ask(world.add("large", 3))
        await asyncio.sleep(1)
        later = world.ask(world.add("later"))
        await world.end(large)
        assert moving.is_admitted and not later.is_admitted

    play(scenario, place=3)


def test_free_rows_are_kept_for_one_whose_patience_is_over(play: Play) -> None:
    async def scenario(world: World) -> None:
        for name in "ab":
            world.ask(world.add(name), 5)
        await asyncio.sleep(1)
        waiting = world.ask(world.add("waiting", 2))
        await asyncio.sleep(1)
        later = world.ask(world.add("later"))
        await world.end(waiting)
        assert waiting.is_admitted and not (later.is_admitted and later.began < waiting.began)

    play(scenario)


def test_no_more_are_closed_than_all_together_need(play: Play) -> None:
    async def scenario(world: World) -> None:
        large, small = world.add("large", 2), world.add("small")
        for adapter in (large, small):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        waiting = [world.ask(world.add(name)) for name in "ab"]
        await asyncio.sleep(1)
        still_open, closed = world.ask(small, 0), world.ask(large, 0)
        await world.end(*waiting)
        assert still_open.waited == 0 and not (closed.is_admitted and closed.began < waiting[0].began)
        assert waiting[0].began == waiting[1].began

    play(scenario)


def test_two_who_want_the_same_adapter_close_for_it_once(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        for adapter in (a, b):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        waiting = [world.ask(c), world.ask(c)]
        await asyncio.sleep(1)
        still_open = world.ask(b, 0)
        await world.end(still_open, *waiting)
        assert still_open.waited == 0

    play(scenario, units=2)


def test_the_idle_are_closed_before_those_that_run(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, idle = world.add("a"), world.add("b"), world.add("idle")
        for adapter in (a, b):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        await world.use(idle)
        waiting = world.ask(world.add("waiting", 2))
        await asyncio.sleep(1)
        answers = {adapter.name: world.ask(adapter, 0) for adapter in (a, b, idle)}
        await world.end(waiting)
        began = {name: request.is_admitted and request.waited == 0 for name, request in answers.items()}
        assert began == {"a@1": False, "b@2": True, "idle@3": False}

    play(scenario)


@pytest.mark.parametrize("ends", ["cancelled", "timed out", "deleted", "failed"])
def test_what_was_closed_is_open_once_the_waiting_one_is_gone(play: Play, ends: str) -> None:
    async def scenario(world: World) -> None:
        hot = [world.add(name) for name in "abc"]
        await world.use(*hot)
        for adapter in hot:
            world.ask(adapter, 60)
        large = world.add("large", 3)
        waiting = world.ask(large, timeout_s=3 if ends == "timed out" else 100)
        await asyncio.sleep(1)
        kept_out = [world.ask(adapter, 0) for adapter in hot]
        await asyncio.sleep(1)
        assert not any(request.is_admitted for request in kept_out)
        if ends == "cancelled":
            world.cancel(waiting)
        elif ends == "deleted":
            await world.scheduler.remove(large)
        elif ends == "failed":
            world.scheduler.fail_waiters(large, EngineUnavailableError("down"))
        await world.end(waiting)
        await asyncio.sleep(0)
        assert all(request.began == waiting.ended for request in kept_out)
        assert world.ask(hot[0], 0) and all(r.waited == 0 for r in await now(world, hot))

    play(scenario)


async def now(world: World, adapters: list[AdapterRef]) -> list[Request]:
    requests = [world.ask(adapter, 0) for adapter in adapters]
    await world.end(*requests)
    return requests


def test_a_request_that_holds_a_lease_may_take_another_though_its_adapter_is_closed(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")

        async def nested() -> None:
            async with world.scheduler.lease(a, 100):
                await asyncio.sleep(5)
                assert world.scheduler.requests_waiting(b) == 1
                async with world.scheduler.lease(a, 0, joins=True):
                    await asyncio.sleep(1)

        outer = world.loop.create_task(nested())
        await asyncio.sleep(1)
        other = world.ask(b)
        await world.end(other)
        await outer
        assert 5 <= other.waited < 5 + GRACE_S + SOON

    play(scenario, units=1)


def test_who_joins_without_a_lease_waits_as_everybody(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        world.ask(a, 5)
        await asyncio.sleep(1)
        with pytest.raises(ServerError, match="no room on the device"):
            async with world.scheduler.lease(b, 1, joins=True):
                raise AssertionError("let in")

    play(scenario, units=1)


# How many run at once


def test_no_more_adapters_run_than_a_step_takes(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        requests = [world.ask(adapter, 2) for adapter in (a, b, c)]
        await asyncio.sleep(0.1)
        joining = world.ask(a, 0)
        await world.end(joining, *requests)
        assert joining.waited == 0 and [request.waited for request in requests] == [0, 0, 2]
        assert world.tiers(a, b, c) == "ddd"

    play(scenario, running=2)


@pytest.mark.parametrize("content", ["", "shared"])
def test_adapters_that_always_run_do_not_keep_one_out_of_the_step(play: Play, content: str) -> None:
    async def scenario(world: World) -> None:
        hot = [world.add(name, content=content) for name in "ab"]
        other = world.add("c", content=content)
        await world.use(*hot, other)
        for adapter in hot:
            world.keep_asking(adapter, every=0.3)
        await asyncio.sleep(10)
        request = world.ask(other)
        await world.end(request)
        assert PATIENCE_S <= request.waited <= PATIENCE_S + 1 + SOON
        assert len(held_up_by(world, request)) == 1

    play(scenario, running=2)


@pytest.mark.parametrize("options", [{"running": 2, "units": 3}, {"units": 2}])
def test_the_one_least_recently_asked_is_closed(play: Play, options: dict[str, int]) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await world.use(c, a, b)
        for adapter in (a, b, a):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        waiting = world.ask(c)
        await asyncio.sleep(1)
        still_open, closed = world.ask(a, 0), world.ask(b, 0)
        await world.end(waiting)
        assert still_open.waited == 0 and not (closed.is_admitted and closed.began < waiting.began)

    play(scenario, **options)


def test_the_one_that_was_closed_stays_the_one(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await world.use(c)
        for adapter in (a, b):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        waiting = world.ask(c)
        await asyncio.sleep(1)
        async with world.scheduler.lease(a, 0, joins=True):
            world.ask(world.add("d"))  # starts another pass
            await asyncio.sleep(0.1)
            closed, still_open = world.ask(a, 0), world.ask(b, 0)
            await asyncio.sleep(0.1)
            assert still_open.waited == 0 and not closed.is_admitted
        await world.end(waiting)

    play(scenario, units=4, running=2)


def test_who_waits_at_a_closed_adapter_closes_no_other(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, also_a, b = world.add("a", content="same"), world.add("also-a", content="same"), world.add("b")
        for adapter in (a, b):
            world.ask(adapter, 5)
            await asyncio.sleep(0.1)
        world.ask(world.add("waiting"))
        await asyncio.sleep(1)
        at_the_closed_one = world.ask(also_a, 0)
        await asyncio.sleep(1)
        still_open = world.ask(b, 0)
        await world.end(still_open)
        assert still_open.waited == 0 and not at_the_closed_one.is_admitted

    play(scenario, units=2, running=2)


def test_one_that_waits_for_its_turn_is_not_evicted_for_a_later_one(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await world.use(b)
        first = world.ask(a, 5)
        await asyncio.sleep(1)
        turn, place = world.ask(b), world.ask(c)
        await world.end(turn, place)
        assert first.ended == turn.began and turn.ended <= place.began
        assert world.calls("place") == [("place", "b@2"), ("place", "a@1"), ("place", "c@3")]

    play(scenario, units=2, running=1)


def test_contents_are_shared(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3, "same"), world.add("b", 3, "same")
        requests = [world.ask(a), world.ask(b)]
        await world.end(*requests)
        assert requests[0].began == requests[1].began and world.engine.count("place") == 1
        assert world.tiers(a, b) == "dd" and world.scheduler.rows_used == 3 * UNIT

    play(scenario)


def test_lora_slots_and_rows_do_not_wait_for_each_other(play: Play) -> None:
    async def scenario(world: World) -> None:
        perft = [world.add(name) for name in "ab"]
        lora = [world.add(name, kind="LORA") for name in "cd"]
        for adapter in (perft[0], lora[0]):
            world.ask(adapter, 20)
        slot = world.ask(lora[1])
        await asyncio.sleep(2)  # its patience is over
        rows = world.ask(perft[1], 0)
        await asyncio.sleep(5)
        assert rows.waited == 0 and not slot.is_admitted
        assert world.tiers(*perft, *lora) == "dddh"
        await world.end(slot)
        assert world.engine.calls.count(("place", lora[1].name)) == 1

    play(scenario, units=2, lora_slots=1)


# Loads that fail


@pytest.mark.parametrize("operation", ["prepare", "place"])
def test_a_failed_load_is_told_and_tried_again_later(play: Play, operation: str) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3, "same"), world.add("b", 3, "same")
        world.engine.failures[operation, a.name] = 1
        waiting = [world.ask(a), world.ask(b), world.ask(a)]
        for request in waiting:
            error = await refused(world, request, 503, "adapter_unavailable")
            assert f"{request.adapter.name} could not be loaded: told to fail: {operation} of a@1" in error.message
            assert error.retry_after_s == RETRY_FAILED_S
        assert world.scheduler.rows_used == 0 and "told to fail" in (world.scheduler.failure(a) or "")
        await asyncio.sleep(RETRY_FAILED_S - 1.5)
        calls = list(world.engine.calls)
        error = await refused(world, world.ask(b), 503, "adapter_unavailable")
        assert error.retry_after_s == 2 and world.engine.calls == calls
        await asyncio.sleep(1.5)
        await world.use(b)
        assert world.scheduler.failure(b) is None and world.events.loads["device", "ok"] == 1

    play(scenario, prepare=1, place=1)


@pytest.mark.parametrize("operation", ["prepare", "place"])
def test_after_a_failed_load_the_others_go_on(play: Play, operation: str) -> None:
    async def scenario(world: World) -> None:
        a, b, idle = world.add("a", 3), world.add("b", 3), world.add("idle")
        await world.use(idle)
        world.engine.failures[operation, a.name] = 1
        first, second = world.ask(a), world.ask(b, timeout_s=10)
        await refused(world, first, 503, "adapter_unavailable")
        await world.end(second)
        assert second.waited < 4 and world.tiers(a, b) == ("xd" if operation == "prepare" else "hd")

    play(scenario, prepare=1, place=1)


@pytest.mark.parametrize("lost_after", [0.5, 1.5])
def test_an_engine_that_fails_leaks_no_rows(play: Play, lost_after: float) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3), world.add("b", 3)
        request = world.ask(a)
        await asyncio.sleep(lost_after)
        world.engine.down = True
        error = await refused(world, request, 503, "adapter_unavailable")
        assert "the engine failed (RuntimeError)" in error.message
        world.engine.down = False
        await asyncio.sleep(RETRY_FAILED_S)
        await world.use(b, a)

    play(scenario, prepare=1, place=1)


def test_an_engine_that_cancels_its_call_ends_the_wait(play: Play) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")

        async def prepare(_: AdapterRef) -> None:
            raise asyncio.CancelledError

        world.engine.prepare, kept = prepare, world.engine.prepare  # type: ignore[method-assign]
        error = await refused(world, world.ask(a), 503, "adapter_unavailable")
        assert "CancelledError" in error.message
        world.engine.prepare = kept  # type: ignore[method-assign]
        await asyncio.sleep(RETRY_FAILED_S)
        await world.use(a)

    play(scenario)


def test_an_activation_learns_that_its_version_cannot_be_read(play: Play) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")
        world.engine.failures["prepare", a.name] = 1
        with pytest.raises(ServerError) as caught:
            await world.scheduler.load(a)
        assert (as_api_error(caught.value).status, caught.value.code) == (503, "adapter_unavailable")
        await asyncio.sleep(RETRY_FAILED_S)
        await world.scheduler.load(a)
        assert world.tiers(a) == "h" and world.events.loads == {("host", "failed"): 1, ("host", "ok"): 1}
        await world.scheduler.load(a)
        assert world.engine.count("prepare") == 2

    play(scenario)


# Waits that end early


def test_a_lease_that_comes_too_late_is_refused(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3), world.add("b", 3)
        world.ask(a, 10)
        error = await refused(world, world.ask(b, timeout_s=2), 503, "adapter_unavailable")
        assert error.retry_after_s == 1 and "b@2 found no room on the device within 2 s" in error.message
        assert world.requests[-1].ended - world.requests[-1].asked == pytest.approx(
            2
        ) and not world.scheduler.requests_waiting(b)

    play(scenario)


def test_a_refusal_that_comes_together_with_a_cancellation_is_no_problem(play: Play) -> None:
    async def scenario(world: World) -> None:
        a = world.add("a")
        request = world.ask(a)
        await asyncio.sleep(0.5)
        world.scheduler.fail_waiters(a, EngineUnavailableError("down"))
        world.cancel(request)
        await world.end(request)
        assert request.task is not None and request.task.cancelled() and not world.scheduler.requests_waiting(a)

    play(scenario, prepare=1)


@pytest.mark.parametrize("what", ["lease", "pin", "load", "remove"])
def test_whenever_it_is_cancelled_nothing_is_left(play: Play, what: str) -> None:
    """The pool is full of a hot adapter: what is cancelled, after ever more rounds of the loop, has to wait for it."""
    was_cancelled: list[bool] = []

    async def scenario(world: World) -> None:
        mine, hot = world.add("mine", 2), world.add("hot", 3)
        if what == "remove":
            await world.use(mine)
        asking = world.keep_asking(hot, 0.3, 0.2)
        await asyncio.sleep(0.25 if what != "remove" else 0)
        starts = {"pin": world.scheduler.pin, "load": world.scheduler.load, "remove": world.scheduler.remove}
        task = world.ask(mine, 0.1).task if what == "lease" else world.loop.create_task(starts[what](mine))
        assert task is not None
        world.at_round[world.rounds + 1 + len(was_cancelled)] = task.cancel
        await asyncio.wait([task])
        was_cancelled.append(task.cancelled())
        asking.cancel()
        await asyncio.sleep(0)
        assert not world.scheduler.requests_waiting(mine)
        if what == "pin" and not task.cancelled():
            world.scheduler.unpin(mine)
        if what != "remove":
            await world.use(world.add("other", 3), mine)

    delays = dict.fromkeys(("prepare", "place", "evict", "drop", "forget"), 0.01)
    while not was_cancelled or was_cancelled[-1]:
        play(scenario, **delays)
    assert len(was_cancelled) > {"lease": 25, "pin": 25, "load": 3, "remove": 7}[what], len(was_cancelled)


# Versions that go


def test_a_removed_version_leaves_in_order(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.scheduler.load(b)
        request = world.ask(a, 1)
        await world.end(request)
        await world.scheduler.remove(a)
        assert world.loop.time() >= request.ended + GRACE_S
        assert world.calls("evict", "drop", "forget") == [("evict", a.name), ("drop", a.name), ("forget", a.name)]
        assert (world.scheduler.tier(a), world.scheduler.failure(a), world.scheduler.requests_waiting(a)) == (
            "disk",
            None,
            0,
        )
        await world.scheduler.remove(b)
        await world.scheduler.remove(world.add("never-loaded"))
        assert [operation for operation, _ in world.engine.calls[-3:]] == ["drop", "forget", "forget"]

    play(scenario)


def test_whatever_moment_it_is_removed_at_the_engine_is_told_in_order(play: Play) -> None:
    moments = iter(range(100))
    answers: list[bool] = []

    async def scenario(world: World) -> None:
        a, b = world.add("a", 3), world.add("b", 3)
        await world.use(b)
        request = world.ask(a, 0)
        await asyncio.sleep(next(moments) * 0.1)
        await world.scheduler.remove(a)
        await world.end(request)
        answers.append(request.is_admitted)
        if not request.is_admitted:
            await refused(world, request, 410, "adapter_deleted")
        assert world.calls("forget") == [("forget", a.name)] and world.scheduler.rows_used <= 3 * UNIT
        await world.use(b)

    while not answers or not answers[-1]:
        play(scenario, prepare=1, place=1, evict=0.5, drop=0.5, forget=0.5)
    assert len(answers) > 15


@pytest.mark.parametrize("moment", [n / 10 + 0.05 for n in range(22)])
def test_the_same_content_may_come_while_it_is_removed(play: Play, moment: float) -> None:
    async def scenario(world: World) -> None:
        old, other = world.add("old", 2, "same"), world.add("other", 1)
        await world.end(world.ask(old))
        removal = world.loop.create_task(world.scheduler.remove(old))
        await asyncio.sleep(moment)
        new = world.add("new", 2, "same")
        requests = [world.ask(new, 0.5), world.ask(other, 0.5)]
        await world.end(*requests)
        await removal
        assert all(request.is_admitted for request in requests)
        assert world.calls("forget") == [("forget", old.name)] and world.tiers(new) == "d"
        kept = moment < GRACE_S
        assert world.engine.count("evict") == (0 if kept else 1), "a new owner in time keeps the place"

    play(scenario, prepare=0.1, place=0.1, evict=0.5, drop=0.5, forget=0.5)


def test_a_removal_ends_though_the_content_is_in_use_again(play: Play) -> None:
    async def scenario(world: World) -> None:
        old = world.add("old", content="same")
        await world.end(world.ask(old))
        removal = world.loop.create_task(world.scheduler.remove(old))
        await asyncio.sleep(GRACE_S / 2)
        world.keep_asking(world.add("new", content="same"), seconds=0.01, every=0.05)
        await asyncio.wait_for(removal, 1)

    play(scenario)


def test_two_versions_of_one_content_go_one_by_one_and_at_once(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name, 1, "same") for name in "abc")
        running = world.ask(b, 5)
        await world.use(a)
        await world.scheduler.remove(a)
        assert world.tiers(b) == "d" and world.calls("evict", "drop", "forget") == [("forget", a.name)]
        await world.end(running)
        await asyncio.gather(world.scheduler.remove(b), world.scheduler.remove(c))
        told = world.calls("evict", "drop")
        assert [operation for operation, _ in told] == ["evict", "drop"] and world.engine.count("forget") == 3

    play(scenario, evict=0.5, drop=0.5, forget=0.5)


def test_two_versions_of_one_content_are_removed_while_it_is_read(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", content="same"), world.add("b", content="same")
        request = world.ask(a)
        await asyncio.sleep(0.5)
        await asyncio.gather(world.scheduler.remove(a), world.scheduler.remove(b))
        await refused(world, request, 410, "adapter_deleted")
        assert world.calls("evict", "drop") == [("drop", a.name)] and world.engine.count("forget") == 2

    play(scenario, prepare=1, drop=1, forget=1)


def test_a_pin_ends_with_its_version(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, other = world.add("a", 3, "same"), world.add("b", 3, "same"), world.add("other")
        await world.scheduler.pin(a)
        await world.scheduler.remove(a)
        await world.use(other)
        assert world.tiers(b, other) == "hd"

    play(scenario)


def test_a_version_is_removed_while_its_content_is_read_for_another(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 1, "same"), world.add("b", 1, "same")
        mine, other = world.ask(a), world.ask(b, 0)
        await asyncio.sleep(0.5)
        await world.scheduler.remove(a)
        await refused(world, mine, 410, "adapter_deleted")
        assert mine.ended - mine.asked == pytest.approx(0.5)
        await world.end(other)
        assert other.waited == pytest.approx(2, abs=SOON)

    play(scenario, prepare=1, place=1)


def test_what_was_removed_is_refused(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 1, "same"), world.add("b", 1, "same")
        await world.use(b)
        await world.scheduler.remove(a)
        await refused(world, world.ask(a), 410, "adapter_deleted")
        await world.scheduler.remove(b)
        await refused(world, world.ask(b), 410, "adapter_deleted")
        for call in (world.scheduler.load, world.scheduler.pin):
            with pytest.raises(ServerError, match="was deleted"):
                await call(a)
        world.scheduler.unpin(a)

    play(scenario)


def test_a_lease_that_outlives_its_version_holds_nothing(play: Play) -> None:
    """A request whose client does not read its last bytes: the engine was told to abort it."""

    async def scenario(world: World) -> None:
        a, b, shared = world.add("a", 3), world.add("b", 3), world.add("a2", 3, content="1")
        assert a.key == shared.key

        async def stale() -> None:
            async with world.scheduler.lease(a, 1):
                await asyncio.sleep(30)

        reader = world.loop.create_task(stale())
        await asyncio.sleep(1)
        world.engine.released[a.key] = world.loop.time()
        await world.scheduler.remove(a)
        assert not reader.done() and world.tiers(shared) == "d"
        await world.use(b, shared)
        assert not reader.done()
        await reader
        await world.use(b)

    play(scenario, running=1)


def test_a_version_can_be_removed_though_the_engine_is_down(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3), world.add("b", 3)
        await world.use(a)
        world.engine.down = True
        await world.scheduler.remove(a)
        assert world.engine.calls[-3:] == [(operation, a.name) for operation in ("evict", "drop", "forget")]
        world.engine.down = False
        await world.use(b)

    play(scenario)


# Copies on the host


async def load(world: World, *adapters: AdapterRef) -> None:
    for adapter in adapters:
        await world.scheduler.load(adapter)
        await asyncio.sleep(0.01)


def test_the_least_recently_used_host_copies_go(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c, d = (world.add(name) for name in "abcd")
        await load(world, b, a, c)
        assert world.tiers(a, b, c) == "hxh" and world.engine.on_host == {a.key, c.key}
        await load(world, d)
        assert world.tiers(a, c, d) == "xhh" and world.events.evictions == {"host": 2}

    play(scenario, host=2)


def test_host_copies_of_what_is_on_the_device_go_first(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await load(world, a)
        await world.use(b)
        await load(world, c)
        assert world.tiers(a, b, c) == "hdh" and world.engine.on_host == {a.key, c.key}

    play(scenario, host=2)


def test_a_version_that_is_removed_as_its_host_copy_goes_leaves_none(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.scheduler.load(a)
        await world.scheduler.load(b)
        await world.scheduler.remove(world.known[0])
        assert world.engine.on_host == {b.key}

    play(scenario, host=1)


def test_the_newest_host_copy_stays_whatever_the_budget(play: Play) -> None:
    async def scenario(world: World) -> None:
        large, other = world.add("large", 3), world.add("other", 3)
        await load(world, large)
        assert world.tiers(large) == "h"
        await load(world, other)
        assert world.tiers(large, other) == "xh"

    play(scenario, host=2)


def test_what_was_just_read_counts_as_used(play: Play) -> None:
    async def scenario(world: World) -> None:
        used, other, read = world.add("used"), world.add("other"), world.add("read")
        await world.use(used, other)
        for adapter in (read, world.add("newest")):
            await world.scheduler.load(adapter)
            await asyncio.sleep(0.01)
        assert world.tiers(used, other, read) == "xdh"

    play(scenario, units=1, host=2)


def test_without_a_host_copy_what_leaves_the_device_is_on_disk(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.use(a)
        await world.scheduler.load(b)
        await asyncio.sleep(0.01)
        assert world.tiers(a, b) == "dh" and world.engine.on_host == {b.key}
        await world.use(b)
        assert world.tiers(a, b) == "xd"
        await world.use(a)
        assert world.engine.count("prepare") == 3

    play(scenario, units=1, host=1)


def test_a_host_copy_that_is_wanted_stays(play: Play) -> None:
    async def scenario(world: World) -> None:
        hot, wanted = world.add("hot"), world.add("wanted")
        running = world.ask(hot, 20)
        await asyncio.sleep(1)
        request = world.ask(wanted)
        await asyncio.sleep(0.1)
        for name in "abcdef":
            await world.scheduler.load(world.add(name))
            assert wanted.key in world.engine.on_host
        await world.end(request)
        assert request.began >= running.ended and world.engine.calls.count(("prepare", wanted.name)) == 1

    play(scenario, units=1, host=1)


def test_a_crowd_of_waiting_requests_does_not_fill_the_host(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.ask(world.add("hot"), 20)
        await asyncio.sleep(5)
        requests = [world.ask(world.add(f"cold-{number}"), 0.1) for number in range(12)]
        most = 0
        while any(request.ended < 0 for request in requests):
            most = max(most, len(world.engine.on_host))
            await asyncio.sleep(0.05)
        assert most <= 4 and all(request.is_admitted for request in requests)
        began = [request.began for request in requests]
        assert began == sorted(began)

    play(scenario, units=1, host=3, prepare=0.2, place=0.1, drop=0.01)


def test_a_small_copy_is_not_read_ahead_of_a_large_one(play: Play) -> None:
    async def scenario(world: World) -> None:
        hot = world.add("hot", 3)
        world.ask(hot, 20)
        await asyncio.sleep(1)
        first, large, small = world.add("first", 2), world.add("large", 2), world.add("small", 1)
        requests = [world.ask(adapter) for adapter in (first, large, small)]
        await asyncio.sleep(1)
        assert world.tiers(first, large, small) == "hxx"
        await world.end(*requests)
        assert requests[1].began <= requests[2].began

    play(scenario, host=3)


def test_requests_that_give_up_do_not_fill_the_host(play: Play) -> None:
    async def scenario(world: World) -> None:
        for number in range(10):
            request = world.ask(world.add(f"cold-{number}"))
            await asyncio.sleep(0.01)
            world.cancel(request)
        await asyncio.sleep(0.5)
        assert world.engine.count("prepare") == 2

    play(scenario, host=2, prepare=1)


@pytest.mark.parametrize("host", [0, 1])
def test_the_first_in_line_is_read_whatever_the_budget(play: Play, host: int) -> None:
    async def scenario(world: World) -> None:
        requests = [world.ask(world.add(name)) for name in "abc"]
        await world.end(*requests)
        assert all(request.is_admitted for request in requests)
        await asyncio.sleep(1)
        assert len(world.engine.on_host) == host

    play(scenario, host=host, prepare=1)


def test_a_copy_that_is_being_dropped_is_read_again_after(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        await world.scheduler.load(a)
        await world.scheduler.load(b)
        request = world.ask(a)
        await world.end(request)
        assert request.waited == pytest.approx(3, abs=SOON)
        assert world.calls("prepare", "drop")[:4] == [
            ("prepare", a.name),
            ("prepare", b.name),
            ("drop", a.name),
            ("prepare", a.name),
        ]

    play(scenario, host=1, prepare=1, drop=2)


def test_a_copy_that_cannot_be_dropped_holds_nobody_up(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await world.scheduler.load(a)
        world.engine.failures["drop", a.name] = 1
        await world.use(b, c)
        assert world.tiers(a, b, c) == "xdd"

    play(scenario, host=1)


# Pins


def test_a_pinned_adapter_is_loaded_and_stays_until_it_is_unpinned(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, c = (world.add(name) for name in "abc")
        await world.scheduler.pin(a)
        assert world.tiers(a) == "d"
        await world.scheduler.pin(a)
        await world.use(b, c, b, c)
        assert world.tiers(a) == "d"
        world.scheduler.unpin(a)
        await world.use(b, c)
        assert world.tiers(a, b, c) == "hdd"
        world.scheduler.unpin(a)
        await world.scheduler.pin(c)

    play(scenario, units=2)


def test_a_pin_beside_which_it_does_not_fit_is_refused(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, small = world.add("a", 2), world.add("b", 2), world.add("small")
        await world.scheduler.pin(a)
        with pytest.raises(ServerError) as caught:
            await world.scheduler.pin(b)
        assert (as_api_error(caught.value).status, caught.value.code) == (
            409,
            "device_full",
        ) and "b@2" in caught.value.message
        await refused(world, world.ask(b), 409, "device_full")
        assert world.tiers(b) == "x"
        await world.scheduler.load(b)
        assert world.tiers(b) == "h"
        await world.scheduler.pin(small)
        world.scheduler.unpin(a)
        await world.use(b)
        with pytest.raises(ServerError, match="does not fit beside the pinned adapters"):
            await world.scheduler.pin(world.add("c", 3))
        await world.scheduler.pin(b)

    play(scenario)


def test_a_pin_that_still_waits_counts(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 2), world.add("b", 2)
        await world.use(b)
        pin = world.loop.create_task(world.scheduler.pin(a))
        await asyncio.sleep(0.5)
        assert world.tiers(a, b) == "xd"
        with pytest.raises(ServerError, match="b@2 does not fit beside"):
            await world.scheduler.pin(b)
        await pin

    play(scenario, prepare=1)


def test_a_content_is_pinned_once_for_all_its_versions(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b, other = world.add("a", 2, "same"), world.add("b", 2, "same"), world.add("other", 3)
        await world.scheduler.pin(a)
        await world.scheduler.pin(b)
        world.scheduler.unpin(a)
        await refused(world, world.ask(other), 409, "device_full")
        world.scheduler.unpin(b)
        await world.use(other)

    play(scenario)


def test_who_waits_has_its_place_as_soon_as_another_is_unpinned(play: Play) -> None:
    async def scenario(world: World) -> None:
        pinned = world.add("pinned")
        await world.scheduler.pin(pinned)
        world.ask(world.add("running"), 20)
        await asyncio.sleep(1)
        request = world.ask(world.add("waiting"))
        await asyncio.sleep(2)
        world.scheduler.unpin(pinned)
        await world.end(request)
        assert request.waited == 2

    play(scenario, units=2)


def test_who_waits_is_refused_once_pins_leave_no_room(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 2), world.add("b", 2)
        world.ask(a, 60)
        await asyncio.sleep(1)
        waiting = world.ask(b)
        await asyncio.sleep(1)
        assert waiting.ended < 0
        await world.scheduler.pin(a)
        await refused(world, waiting, 409, "device_full")
        assert waiting.ended - waiting.asked == pytest.approx(1)
        kept_open = world.ask(a, 0)
        await world.end(kept_open)
        assert kept_open.waited == 0

    play(scenario)


def test_a_pin_takes_the_place_of_another_than_the_one_that_was_closed(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        for adapter in (a, b):
            world.ask(adapter, 20)
        world.ask(world.add("cold"))
        await asyncio.sleep(2)
        await world.scheduler.pin(a)
        await world.scheduler.pin(a)
        open_again, closed = world.ask(a, 0), world.ask(b, 0)
        await asyncio.sleep(2)
        assert open_again.waited == 0 and not closed.is_admitted

    play(scenario, units=2)


def test_a_pin_waits_in_line_and_gets_in(play: Play) -> None:
    async def scenario(world: World) -> None:
        for name in "abc":
            world.keep_asking(world.add(name))
        await asyncio.sleep(5)
        first = world.ask(world.add("first"))
        await asyncio.sleep(0.01)
        began, pinned = world.loop.time(), world.add("pinned", 2)
        pin = world.loop.create_task(world.scheduler.pin(pinned))
        await asyncio.sleep(0.01)
        later = world.ask(world.add("later"))
        await pin
        assert world.loop.time() - began < 3 and first.is_admitted and not later.is_admitted
        await asyncio.sleep(10)
        assert world.tiers(pinned) == "d"

    play(scenario)


def test_a_pin_takes_no_turn(play: Play) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a"), world.add("b")
        running = world.ask(a, 60)
        await asyncio.sleep(1)
        await world.scheduler.pin(b)
        assert world.tiers(b) == "d" and running.ended < 0

    play(scenario, running=1)


@pytest.mark.parametrize("ends", ["cancelled", "failed", "deleted"])
def test_a_pin_that_ends_early_pins_nothing(play: Play, ends: str) -> None:
    async def scenario(world: World) -> None:
        a, b = world.add("a", 3), world.add("b", 3)
        world.engine.failures["place", a.name] = 1 if ends == "failed" else 0
        pin = world.loop.create_task(world.scheduler.pin(a))
        await asyncio.sleep(0.5)
        waiting = world.ask(b)
        await refused(world, waiting, 409, "device_full")
        if ends == "cancelled":
            pin.cancel()
        elif ends == "deleted":
            await world.scheduler.remove(a)
        await asyncio.wait([pin])
        await world.use(b)
        assert pin.cancelled() or isinstance(pin.exception(), ServerError)

    play(scenario, prepare=1, place=1)
