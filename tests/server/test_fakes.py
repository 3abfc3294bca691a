"""The fake engine holds its caller to the rules of `server.engine.protocol`."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters.ref import AdapterRef
from perft.operator.tables import pool_rows
from server.engine.protocol import AdapterLoadError, Engine
from tests.server.fakes import BASE, FakeEngine, ready_status, rows_of
from tests.synthetic import write_adapter


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def poet(tmp_path: Path) -> AdapterRef:
    return AdapterRef("poet@1", 1, "PERFT", "d" * 64, write_adapter(tmp_path / "poet", BASE, 0))


def run(*steps: Coroutine[Any, Any, Any]) -> None:
    async def in_order() -> None:
        for step in steps:
            await step

    asyncio.run(in_order())


def breaks_a_rule(engine: FakeEngine, step: Coroutine[Any, Any, Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        asyncio.run(step)
    assert len(engine.broken_rules) == 1


def test_an_adapter_goes_to_the_host_then_the_device_and_back(engine: FakeEngine, poet: AdapterRef) -> None:
    real: Engine = engine
    run(real.prepare(poet), real.place(poet))
    assert asyncio.run(real.status()).rows_used == rows_of(poet) == pool_rows(2 * (4 + 2 * 4 * 16))
    run(real.evict(poet), real.drop(poet), real.forget(poet))
    assert engine.rows_used == 0 and not engine.on_host and not engine.broken_rules
    assert [operation for operation, _ in engine.calls] == ["prepare", "place", "evict", "drop", "forget"]


def test_place_needs_the_host(engine: FakeEngine, poet: AdapterRef) -> None:
    breaks_a_rule(engine, engine.place(poet), "not on the host")


def test_evict_needs_the_device(engine: FakeEngine, poet: AdapterRef) -> None:
    run(engine.prepare(poet))
    breaks_a_rule(engine, engine.evict(poet), "not on the device")


def test_rows_never_exceed_the_pool(poet: AdapterRef) -> None:
    engine = FakeEngine(ready_status(rows_total=rows_of(poet) - 1))
    run(engine.prepare(poet))
    breaks_a_rule(engine, engine.place(poet), "rows of")


def test_what_is_evicted_makes_room_first(poet: AdapterRef) -> None:
    engine = FakeEngine(ready_status(rows_total=rows_of(poet)))
    other = AdapterRef("clerk@1", 2, "PERFT", "e" * 64, poet.folder)
    run(engine.prepare(poet), engine.prepare(other), engine.place(poet), engine.place(other, [poet]))
    assert set(engine.on_device) == {other.key} and engine.most_rows == rows_of(poet)


def test_a_running_adapter_stays(engine: FakeEngine, poet: AdapterRef) -> None:
    async def evict_under_a_request() -> None:
        async with engine.request(poet):
            await engine.evict(poet)

    run(engine.prepare(poet), engine.place(poet))
    breaks_a_rule(engine, evict_under_a_request(), "a request runs on")


def test_an_id_is_one_version_for_ever(engine: FakeEngine, poet: AdapterRef) -> None:
    run(engine.prepare(poet), engine.drop(poet), engine.forget(poet))
    breaks_a_rule(engine, engine.prepare(poet), "was forgotten")


def test_it_fails_as_often_as_it_is_told(engine: FakeEngine, poet: AdapterRef) -> None:
    engine.failures["place", "poet@1"] = 1
    run(engine.prepare(poet))
    with pytest.raises(AdapterLoadError, match="told to fail"):
        run(engine.place(poet))
    assert engine.rows_used == 0
    run(engine.place(poet))
    assert engine.rows_used == rows_of(poet)
