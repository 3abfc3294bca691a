"""Servers that share a store start only with the same `--store-lag-s` and `--store-grace-s`, whatever happens at that
moment; a store of before has none, and takes those of the first server that starts."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import StoreError, StoreUnusableError
from adapters.store import Timing, open_store, verify_store
from adapters.store.log.agreement import SERVERS_FILE, agree, agreed
from server.commands.store import run
from server.errors import StartError
from server.following.opening import open_store_of
from server.settings.model import Settings
from tests.store.faults import Faulty, KilledError
from tests.store.places import Shared
from tests.store_contents import perft, table, upload

TWO, FIVE = Timing(store_lag_s=2.0, store_grace_s=60.0), Timing(store_lag_s=5.0, store_grace_s=60.0)


def test_the_first_decides_and_another_value_is_refused(shared: Shared) -> None:
    agree(shared.objects, TWO)
    agree(shared.objects, TWO)
    for other in (FIVE, Timing(store_lag_s=2.0, store_grace_s=30.5)):
        with pytest.raises(StoreUnusableError) as refused:
            agree(shared.objects, other)
        assert f"found {other} on this server, expected {TWO}" in str(refused.value)
        assert f"stop all its servers, run `perft store timing {shared.objects} --forget`" in str(refused.value)
    assert agreed(shared.objects) == TWO


def test_of_two_that_start_at_once_one_is_refused(shared: Shared) -> None:
    """The second one starts after the first has found nothing, and before it writes."""
    faulty = Faulty(shared.objects)
    faulty.before = lambda operation, key: agree(shared.objects, FIVE) if operation == "create" else None
    with pytest.raises(StoreUnusableError, match="expected --store-lag-s 5"):
        agree(faulty, TWO)
    assert agreed(shared.objects) == FIVE


def lost(operation: str, key: str) -> None:
    raise OSError("no answer")


def killed(operation: str, key: str) -> None:
    raise KilledError


@pytest.mark.parametrize("fault", [lost, killed])
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_start_that_fails_at_any_step_agrees_to_nothing_else(
    moment: str, step: int, fault: Callable[[str, str], None], shared: Shared
) -> None:
    faulty = Faulty(shared.objects)

    def at_the_step(operation: str, key: str) -> None:
        if len(faulty.steps) == step + 1:
            fault(operation, key)

    setattr(faulty, moment, at_the_step)
    with pytest.raises((StoreUnusableError, KilledError)):
        agree(faulty, TWO)
    assert len(faulty.steps) == step + 1
    is_written = agreed(shared.objects) is not None
    assert is_written == (step == 2 or (step, moment) == (1, "after"))
    if is_written:
        with pytest.raises(StoreUnusableError, match="expected --store-lag-s 2"):
            agree(shared.objects, FIVE)
    agree(shared.objects, TWO)


def test_a_damaged_file_is_named(shared: Shared) -> None:
    shared.open().close()
    shared.objects.create(SERVERS_FILE, b'{"store_lag_s": 2.0')
    with pytest.raises(StoreUnusableError, match=r"servers.json is damaged, .*--forget"):
        agree(shared.objects, TWO)
    (problem,) = shared.problems()
    assert "servers.json is damaged" in problem


async def opened(address: str, cache: Path, **settings: float) -> None:
    (await open_store_of(Settings(adapter_store=address, adapter_cache=cache, **settings))).close()


def test_an_operator_changes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store without the file, as older versions left it, is opened as it is; the values are changed on purpose."""
    address, cache = f"file://{tmp_path / 'shared'}", tmp_path / "cache"
    assert run(["timing", address, "--forget"]) == 1 and "found no STORE.json" in capsys.readouterr().err
    store = open_store(address, cache)
    upload(store, "a", perft(1))
    before = table(store)
    store.close()
    assert run(["timing", address]) == 0 and "no server has started" in capsys.readouterr().out
    asyncio.run(opened(address, cache))
    assert run(["timing", address]) == 0 and "--store-lag-s 2 and --store-grace-s 60" in capsys.readouterr().out
    with pytest.raises(StartError, match=r"^--adapter-store: .*found --store-lag-s 5 .*expected --store-lag-s 2"):
        asyncio.run(opened(address, cache, store_lag_s=5))
    assert run(["timing", address, "--forget"]) == 0
    asyncio.run(opened(address, cache, store_lag_s=5))
    with pytest.raises(StartError, match="expected --store-lag-s 5"):
        asyncio.run(opened(address, cache))
    assert verify_store(address) == []
    store = open_store(address, cache)
    assert table(store) == before
    store.close()


def test_a_store_that_is_refused_is_closed(tmp_path: Path) -> None:
    address, cache = f"file://{tmp_path / 'shared'}", tmp_path / "cache"
    open_store(address, cache, timing=TWO).close()
    with pytest.raises(StoreError):
        open_store(address, cache, timing=FIVE)
    open_store(address, cache, timing=TWO).close()  # it holds the cache no more
