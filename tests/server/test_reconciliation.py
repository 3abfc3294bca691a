"""Server and workers compare what they hold, and a difference is mended: on the fake engine, in virtual time."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters.ref import AdapterRef
from server.residency.reconciliation import Reconciler
from tests.server.residency_world import UNIT, World, write_sizes
from tests.server.virtual_time import run_virtually


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    write_sizes(folder)
    return folder


def play(folder: Path, scenario: Any, **options: Any) -> None:
    async def main() -> None:
        world = World(folder, **options)
        worlds.append(world)
        await scenario(world, Reconciler(world.engine, world.scheduler))
        await world.leave_nothing()

    worlds: list[World] = []
    coroutine: Coroutine[Any, Any, None] = main()
    run_virtually(coroutine, lambda: worlds[0].check() if worlds else None)


def held(world: World, adapter: AdapterRef) -> tuple[bool, bool]:
    """Whether the engine holds it on the host, and on the device."""
    return adapter.key in world.engine.on_host, adapter.key in world.engine.on_device


def test_what_agrees_is_left_alone(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a, b = world.add("a"), world.add("b")
        await world.use(a)
        await world.scheduler.load(b)
        calls = list(world.engine.calls)
        assert await reconciler.run() == [] and world.engine.calls == calls and not world.events.repairs
        assert world.tiers(a, b) == "dh"

    play(folder, scenario)


@pytest.mark.parametrize("lost", [("device",), ("host",), ("host", "device")])
def test_what_an_idle_worker_lost_is_loaded_for_the_next_request(folder: Path, lost: tuple[str, ...]) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        await world.use(a)
        if "device" in lost:
            del world.engine.on_device[a.key]
        if "host" in lost:
            world.engine.on_host.discard(a.key)
        found = await reconciler.run()
        assert found == [f"a@1 should be on the {tier} of every rank and is not; it is repaired" for tier in lost]
        await asyncio.sleep(1)
        assert held(world, a) == ("host" not in lost, "device" not in lost)
        assert await reconciler.run() == [] and sum(world.events.repairs.values()) == len(lost)
        await world.use(a)
        assert held(world, a)[1]

    play(folder, scenario)


def test_what_a_running_request_needs_is_loaded_again_at_once(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        request = world.ask(a, seconds=10)
        await asyncio.sleep(1)
        world.engine.on_device.clear(), world.engine.on_host.clear()
        assert len(await reconciler.run()) == 2
        await asyncio.sleep(1)
        assert held(world, a) == (True, True) and world.tiers(a) == "d"
        await world.end(request)
        assert request.error is None

    play(folder, scenario)


@pytest.mark.parametrize("is_known", [True, False])
def test_what_a_worker_should_not_hold_is_freed(folder: Path, is_known: bool) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        key = a.key if is_known else "0" * 64
        world.engine.on_host.add(key)
        world.engine.on_device[key] = 4
        found = await reconciler.run()
        orphan = "the {} holds content 000000000000..., which no version has"
        words = "is on the {} and should not be" if is_known else orphan
        assert len(found) == 2
        assert all(words.format(tier) in text for tier, text in zip(("host", "device"), found, strict=True))
        await asyncio.sleep(1)
        assert not world.engine.on_host and not world.engine.on_device
        await world.use(a)

    play(folder, scenario)


def test_what_is_on_its_way_is_no_difference(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a, b = world.add("a"), world.add("b")
        await world.use(b)
        request = world.ask(a, seconds=2)
        for _ in range(60):
            assert await reconciler.run() == []
            await asyncio.sleep(0.1)
        await world.end(request)
        removal = asyncio.create_task(world.scheduler.remove(b))
        assert await reconciler.run() == []
        await removal

    play(folder, scenario, prepare=1.0, place=1.0, inventory=0.3, evict=0.5, drop=0.5)


def test_rows_that_belong_to_nobody_are_reported(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        await world.use(a)
        world.engine.on_device[a.key] += 1
        assert await reconciler.run() == [
            f"found [{UNIT + 1}] rows in use by rank, expected {UNIT} on each; restart the server"
        ]
        assert await reconciler.run() == [], "it was reported already"

    play(folder, scenario)


def test_a_repair_that_fails_admits_nothing_and_is_tried_again(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        request = world.ask(a, seconds=30)
        await asyncio.sleep(1)
        world.engine.on_device.clear()
        world.engine.failures["place", a.name] = 1
        assert await reconciler.run()
        await asyncio.sleep(1)
        refused = world.ask(a)
        await world.end(refused)
        assert refused.error is not None and "told to fail" in refused.error.message
        assert await reconciler.run()
        await asyncio.sleep(1)
        assert held(world, a) == (True, True)
        await world.use(a)
        await world.end(request)
        assert request.error is None

    play(folder, scenario)


def test_a_pinned_adapter_that_was_lost_is_on_the_device_again(folder: Path) -> None:
    async def scenario(world: World, reconciler: Reconciler) -> None:
        a = world.add("a")
        await world.scheduler.pin(a)
        world.engine.on_device.clear()
        assert await reconciler.run()
        await asyncio.sleep(1)
        assert held(world, a) == (True, True) and world.tiers(a) == "d" and await reconciler.run() == []

    play(folder, scenario)
