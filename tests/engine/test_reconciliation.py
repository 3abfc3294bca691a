"""Server and worker compare what they hold: the real scheduler and the real worker, made to differ behind its back."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

from adapters.format.folder import read_folder
from adapters.ref import AdapterRef
from perft.operator.tables import adapter_rows
from server.engine.vllm import VllmEngine
from server.residency.reconciliation import Reconciler
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import Capacity, Need
from tests.engine.engines import TinyEngine
from tests.engine.test_ordered_loading import answer, manager_of
from tests.server.desk import Events
from tests.synthetic import write_adapter

IDS = count(9000)


class InProcess:
    """An EngineClient's `collective_rpc`, over an engine in this process."""

    def __init__(self, engine: TinyEngine) -> None:
        self._engine = engine

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return list(self._engine.llm.collective_rpc(method, args=args))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not is_so():
            await asyncio.sleep(0.01)


def with_scheduler(
    engine: TinyEngine, test: Callable[[ResidencyScheduler, Reconciler, VllmEngine], Awaitable[None]]
) -> None:
    async def main() -> None:
        client: Any = InProcess(engine)
        real = VllmEngine(client)
        status = await real.status()
        scheduler = ResidencyScheduler(real, Capacity(status.rows_total, 0, 2**40, 8), Events())
        reconciler = Reconciler(real, scheduler)
        await reconciler.run()  # frees what other tests left in the engine that they share
        await until(lambda: not scheduler.transfers._tasks)
        assert await reconciler.run() == []
        await test(scheduler, reconciler, real)

    asyncio.run(main())


def adapter_in(engine: TinyEngine, folder: Path, seed: int) -> tuple[AdapterRef, Need]:
    """A random adapter under an id of its own."""
    manager, number = manager_of(engine), next(IDS)
    checked = read_folder(write_adapter(folder, manager.base, seed), manager.base)
    rows = adapter_rows(checked.config, manager.base.moe_layers)
    return AdapterRef(f"held@{number}", number, "PERFT", checked.digest, folder), Need(rows, 0, 1)


def test_a_difference_is_found_and_mended(engine: TinyEngine, tmp_path: Path) -> None:
    """The worker loses an adapter of the server's, and holds one that the server knows nothing of."""
    (mine, need), (foreign, _) = adapter_in(engine, tmp_path / "mine", 51), adapter_in(engine, tmp_path / "foreign", 52)

    async def test(scheduler: ResidencyScheduler, reconciler: Reconciler, real: VllmEngine) -> None:
        scheduler.add(mine, need)
        async with scheduler.lease(mine, 300):
            pass
        expected = answer(engine, mine.to_wire())
        await real.prepare(foreign)
        await real.place(foreign)
        manager_of(engine).ordered_loading.evict(mine.key)
        found = await reconciler.run()
        assert len(found) == 3 and any("held@" in text and "device of every rank" in text for text in found), found
        assert sum("which no version has" in text for text in found) == 2, found
        await until(lambda: not scheduler.transfers._tasks)
        (rank,) = await real.inventory()
        assert foreign.key not in rank.host | rank.device and mine.key in rank.host and mine.key not in rank.device
        assert scheduler.tier(mine) == "host" and await reconciler.run() == []
        async with scheduler.lease(mine, 300):
            assert answer(engine, mine.to_wire()) == expected
        await scheduler.remove(mine)
        await real.forget(foreign)
        assert manager_of(engine).pool.used == 0

    with_scheduler(engine, test)


def test_an_adapter_lost_under_a_running_request_is_loaded_again(engine: TinyEngine, tmp_path: Path) -> None:
    mine, need = adapter_in(engine, tmp_path / "mine", 53)

    async def test(scheduler: ResidencyScheduler, reconciler: Reconciler, real: VllmEngine) -> None:
        scheduler.add(mine, need)
        async with scheduler.lease(mine, 300):
            expected = answer(engine, mine.to_wire())
            for free in (manager_of(engine).ordered_loading.evict, manager_of(engine).ordered_loading.drop):
                free(mine.key)
            assert len(await reconciler.run()) == 2
            await until(lambda: not scheduler.transfers._tasks)
            read_in_steps = manager_of(engine).step_loader.bytes_read
            assert answer(engine, mine.to_wire()) == expected
            assert manager_of(engine).step_loader.bytes_read == read_in_steps, "nothing was read inside a step"
        await scheduler.remove(mine)

    with_scheduler(engine, test)


def test_a_step_before_the_repair_still_answers(engine: TinyEngine, tmp_path: Path) -> None:
    """Rows that are gone under a running request are placed again from the host; the engine goes on."""
    mine, need = adapter_in(engine, tmp_path / "mine", 54)

    async def test(scheduler: ResidencyScheduler, reconciler: Reconciler, real: VllmEngine) -> None:
        scheduler.add(mine, need)
        async with scheduler.lease(mine, 300):
            expected = answer(engine, mine.to_wire())
            manager_of(engine).ordered_loading.evict(mine.key)
            read_in_steps = manager_of(engine).step_loader.bytes_read
            assert answer(engine, mine.to_wire()) == expected
            assert manager_of(engine).step_loader.bytes_read == read_in_steps, "nothing was read inside a step"
            assert await reconciler.run() == []
        await scheduler.remove(mine)

    with_scheduler(engine, test)
