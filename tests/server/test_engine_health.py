"""What is known of the engine's life: its death and its hanging end what waits for it, and nothing else does."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import monitor as monitor_module
from server.engine import health as health_module
from server.engine.health import EngineHealth, WatchedEngine
from server.errors import EngineUnavailableError
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.synthetic import RANDOM_R, write_adapter

WAIT_S = 300.0


@dataclass
class FakeProcesses:
    """Processes that die when told."""

    dead: bool = False
    asked: bool = False

    def is_dead(self) -> bool:
        return self.dead

    def death(self) -> str:
        return "process EngineCore (7) was killed by SIGKILL"

    def was_asked_to_end(self) -> bool:
        return self.asked


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def on_a_real_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), WAIT_S))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "TICK_S", 0.01)
    monkeypatch.setattr(health_module, "CONFIRM_S", 0.02)


async def pause() -> None:
    await asyncio.sleep(0.1)


def waiting(health: EngineHealth, is_patient: bool = False) -> "asyncio.Task[None]":
    """A question that is never answered."""
    return asyncio.get_running_loop().create_task(health.ask(asyncio.sleep(3600), is_patient))


@on_a_real_loop
async def test_a_death_ends_every_wait_and_is_announced() -> None:
    processes = FakeProcesses()
    health = EngineHealth(3600.0, processes)
    health.start()
    asked, patient = waiting(health), waiting(health, is_patient=True)
    waits = asyncio.create_task(health.wait(asyncio.sleep(3600)))
    await pause()
    assert health.problem() is None and not asked.done()
    processes.dead = True
    assert "died" in (health.problem() or "")
    for task in (asked, patient, waits):
        with pytest.raises(EngineUnavailableError):
            await task
    assert await health.died() == "the engine died: process EngineCore (7) was killed by SIGKILL"
    for call in (health.ask(asyncio.sleep(0)), health.wait(asyncio.sleep(0))):
        with pytest.raises(EngineUnavailableError, match="SIGKILL"):
            await call


@on_a_real_loop
async def test_an_end_that_the_server_asked_for_is_no_death() -> None:
    processes = FakeProcesses()
    health = EngineHealth(3600.0, processes)
    health.start()
    asked = waiting(health)
    await pause()
    health.ending()
    processes.dead = True
    with pytest.raises(EngineUnavailableError, match="the server is ending"):
        await asked
    await pause()
    assert health.death is None


@on_a_real_loop
async def test_what_an_engine_says_while_it_dies_is_its_death() -> None:
    """vLLM's own error of a request comes first."""
    processes = FakeProcesses()
    health = EngineHealth(3600.0, processes)

    async def outputs() -> AsyncGenerator[int, None]:
        yield 1
        processes.dead = True
        raise RuntimeError("EngineCore encountered an issue")

    found = health.outputs(outputs())
    assert await anext(found) == 1
    with pytest.raises(EngineUnavailableError):
        await anext(found)


@on_a_real_loop
async def test_a_hang_ends_requests_and_passes() -> None:
    clock, answer = Clock(), asyncio.Event()
    health = EngineHealth(60.0, FakeProcesses(), clock)
    health.start()
    poll = asyncio.create_task(health.ask(answer.wait(), is_patient=True))
    request = waiting(health)
    lease = asyncio.create_task(health.wait(asyncio.sleep(3600)))
    await pause()
    clock.now += 6
    assert health.problem() is None and "not answered for 6 s" in (health.doubt() or "")
    await pause()
    clock.now += 50
    await pause()
    assert not request.done() and not lease.done()
    clock.now += 10
    for task in (request, lease):
        with pytest.raises(EngineUnavailableError, match="has not answered for"):
            await task
    with pytest.raises(EngineUnavailableError):
        await health.ask(asyncio.sleep(0))
    assert not poll.done()
    answer.set()
    await poll
    assert health.problem() is None and health.doubt() is None
    await health.ask(asyncio.sleep(0))


@on_a_real_loop
async def test_any_answer_to_anybody_is_a_sign_of_life() -> None:
    """A request that waits long among others whose tokens come."""
    clock = Clock()
    health = EngineHealth(60.0, FakeProcesses(), clock)
    health.start()
    request = waiting(health)
    for _ in range(20):
        clock.now += 50
        await health.ask(asyncio.sleep(0))
    await pause()
    assert not request.done() and health.doubt() is None
    request.cancel()


@on_a_real_loop
async def test_nothing_asked_is_no_silence() -> None:
    clock = Clock()
    health = EngineHealth(60.0, FakeProcesses(), clock)
    health.start()
    clock.now += 3600
    assert health.silent_s == 0
    withdrawn = waiting(health)
    await pause()
    withdrawn.cancel()
    await pause()
    clock.now += 3600
    assert health.silent_s == 0 and health.problem() is None


@on_a_real_loop
async def test_a_poll_that_gave_up_is_no_answer() -> None:
    """The engine hangs on while the next poll is not asked yet."""
    clock = Clock()
    health = EngineHealth(60.0, FakeProcesses(), clock)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await health.ask(_times_out(), is_patient=True)
    with pytest.raises(TimeoutError):
        await health.ask(_times_out(), is_patient=True)
    clock.now += 61
    assert health.silent_s == 61


async def _times_out() -> None:
    await asyncio.sleep(0.02)
    raise TimeoutError


@on_a_real_loop
async def test_a_process_that_stood_still_itself_blames_nobody() -> None:
    """Stopped as a whole, or a machine that slept: the answers that came meanwhile were not read yet."""
    health = EngineHealth(1.0, FakeProcesses())
    health.start()
    request = waiting(health)
    await asyncio.sleep(0.05)
    time.sleep(1.5)
    await asyncio.sleep(0.05)
    assert health.problem() is None and not request.done()
    with pytest.raises(EngineUnavailableError):
        await request


@on_a_real_loop
async def test_every_call_of_the_engine_is_watched() -> None:
    processes = FakeProcesses()
    engine = FakeEngine(delays={"status": 3600, "counters": 3600, "inventory": 3600})
    health = EngineHealth(3600.0, processes)
    health.start()
    watched = WatchedEngine(engine, health)
    calls = [asyncio.create_task(call) for call in (watched.status(), watched.counters(), watched.inventory())]  # type: ignore[type-var]
    await pause()
    processes.dead = True
    for call in calls:
        with pytest.raises(EngineUnavailableError):
            await call


@pytest.mark.parametrize("end", ["death", "hang"])
def test_what_waits_for_the_engine_in_a_server_ends_with_it(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load for a request, an upload that is to be activated, a pin: 503 engine_unavailable, and nothing is
    half changed."""
    monkeypatch.setattr(monitor_module, "POLL_EVERY_S", 0.05)
    stopped, operations = tmp_path / "stopped", ("status", "counters", "inventory", "prepare", "place", "drop", "evict")
    processes, engine = FakeProcesses(), FakeEngine(holds=dict.fromkeys(operations, stopped))
    settings = settings_of(tmp_path / "store", engine_timeout_s=1.0 if end == "hang" else 3600.0)
    app = build_app(settings, engine, processes)
    values = RANDOM_R | {"bottleneck": 4}
    files = {name: _files(write_adapter(tmp_path / name, BASE, seed, values)) for seed, name in enumerate("abc")}

    @on_a_real_loop
    async def test() -> None:
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=bearer()) as client,
        ):
            for name in "ab":
                answer = await client.post("/v1/adapters", data={"name": "a", "activate": "true"}, files=files[name])
                assert answer.status_code == 201, answer.text
            before = (await client.get("/v1/adapters/a")).json()
            # Nothing is answered from now on. The rollback's version is on the host already.
            stopped.touch()
            asked = [
                asyncio.create_task(client.post("/v1/completions", json={"model": "a", "max_tokens": 1})),
                asyncio.create_task(client.post("/v1/adapters", data={"name": "c", "activate": "1"}, files=files["c"])),
                asyncio.create_task(client.patch("/v1/adapters/a", json={"pinned": True})),
            ]
            if end == "death":
                await asyncio.sleep(0.5)
                assert not any(task.done() for task in asked)
                processes.dead = True
            for task in asked:
                answer = await task
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] == "engine_unavailable", answer.text
            assert (await client.get("/ready")).status_code == 503
            after = (await client.get("/v1/adapters/a")).json()
            assert (after["active"], after["pinned"]) == (before["active"], False)
            if end == "hang":
                stopped.unlink()
                async with asyncio.timeout(WAIT_S):
                    while (await client.get("/ready")).status_code != 200:
                        await asyncio.sleep(0.05)
                answer = await client.post("/v1/completions", json={"model": "a"})
                assert answer.status_code == 200, answer.text
            assert not engine.broken_rules

    test()


def _files(folder: Path) -> dict[str, bytes]:
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {field: (folder / name).read_bytes() for field, name in names.items()}
