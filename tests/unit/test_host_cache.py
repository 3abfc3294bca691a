"""Moves between disk, host and device: each end is told as it was, once, and only to the move it belongs to."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters import Limits
from adapters.ref import AdapterRef
from perft.engine import host_cache as tiers_module
from perft.engine.host_cache import HostCache, Mover, Outcome
from perft.engine.manager import AdapterManager
from perft.engine.pool import RowPool
from tests.store_contents import BASE

WAIT_S = 10.0


@pytest.fixture
def mover() -> Mover:
    return Mover(0.0)


def nothing() -> None:
    pass


def until(gate: threading.Event) -> Callable[[], None]:
    """A job that ends with the gate's opening."""

    def job() -> None:
        gate.wait(WAIT_S)

    return job


def end_untold(mover: Mover, key: str, job: Callable[[], None]) -> None:
    """Run a job to its end without being told of it: the question, or its answer, got lost."""
    gate = threading.Event()
    mover.start("before it", until(gate))
    assert mover.start(key, job) == Outcome("running")
    gate.set()
    mover._jobs[key].exception(WAIT_S)


class EndsWhileAsked(Future[None]):
    """A job that succeeds just after waiting for it was given up."""

    def result(self, timeout: float | None = None) -> None:
        try:
            return super().result(timeout)
        except TimeoutError:
            self.set_result(None)
            raise


def test_a_job_that_ends_while_it_is_asked_for_did_not_fail(mover: Mover) -> None:
    job = mover._jobs["a"] = EndsWhileAsked()
    assert mover.outcome("a") == Outcome("running")
    job.set_result(None)
    assert mover.outcome("a") == Outcome("done") and mover.outcome("a") == Outcome("told")


def test_a_job_is_under_way_until_its_end(mover: Mover) -> None:
    gate = threading.Event()
    assert mover.start("a", until(gate)) == Outcome("running")
    assert mover.start("a", nothing) == Outcome("running") == mover.outcome("a")
    gate.set()
    assert mover.outcome("a", WAIT_S) == Outcome("done")


@pytest.mark.parametrize("error", [TimeoutError("the disk"), MemoryError("no memory"), OSError("no such file")])
def test_a_job_that_raised_failed_with_its_reason(mover: Mover, error: Exception) -> None:
    def fail() -> None:
        raise error

    end_untold(mover, "a", fail)
    assert mover.outcome("a") == Outcome("failed", f"{type(error).__name__}: {error}")


def test_an_end_that_was_never_told_is_not_the_next_jobs(mover: Mover) -> None:
    ran: list[str] = []
    end_untold(mover, "a", nothing)
    assert Outcome("done") in (mover.start("a", lambda: ran.append("a")), mover.outcome("a", WAIT_S))
    assert ran == ["a"]


def test_a_job_that_ended_can_be_forgotten(mover: Mover) -> None:
    gate = threading.Event()
    end_untold(mover, "a", nothing)
    mover.start("b", until(gate))
    for key in "abc":
        mover.forget(key)
    assert mover.outcome("a") == Outcome("told") and mover.outcome("b") == Outcome("running")
    gate.set()


@pytest.mark.parametrize("undo", ["evict", "drop"])
def test_what_was_undone_is_not_told_to_be_done(undo: str) -> None:
    """The server's question for a move's end failed; it gives up the rows, or the host's copy."""
    calls: list[str] = []
    manager = AdapterManager.__new__(AdapterManager)
    manager._moves = {"prepare": Mover(WAIT_S), "place": Mover(WAIT_S)}
    manager.step = SimpleNamespace(plan=None)  # type: ignore[assignment]
    manager.tiers = SimpleNamespace(evict=calls.append, drop=calls.append)  # type: ignore[assignment]
    order = AdapterRef("a@1", 1, "PERFT", "d", Path("/a"))
    move = {"evict": "place", "drop": "prepare"}[undo]
    manager._moves[move]._jobs[order.key] = lost = Future()
    lost.set_result(None)
    getattr(manager, undo)(order)
    assert calls == ["d"] and manager.outcome(move, order) == Outcome("told")


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> HostCache:
    """HostCache whose reading takes no time: a folder's name is its digest."""

    def read_folder(folder: Path, *_: Any) -> Any:
        return SimpleNamespace(digest=folder.name.split("-")[0], config=None, layer_weights=lambda base: {})

    monkeypatch.setattr(tiers_module, "read_folder", read_folder)
    monkeypatch.setattr(tiers_module, "pack", lambda config, layers: SimpleNamespace(rows=0))
    return HostCache(RowPool(4, 8, torch.float32, torch.device("cpu")), BASE, Limits())


@pytest.fixture
def often() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("often")
def test_folders_are_known_whatever_is_dropped_while_they_are_read(tiers: HostCache) -> None:
    """The engine's thread drops some adapters while the other one reads the next."""
    old, new = [f"old{i}" for i in range(1000)], [f"new{i}" for i in range(1000)]
    for digest in old:
        tiers.read(digest, Path(digest))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: [tiers.read(digest, Path(digest)) for digest in new])
        for digest in old:
            tiers.drop(digest)
        reading.result(WAIT_S)
    assert [tiers.digest_of(digest) for digest in new] == new
    assert not any(tiers.digest_of(digest) for digest in old)


def test_a_folder_is_known_while_its_content_is_held(tiers: HostCache) -> None:
    tiers.read("a", Path("a-first"))
    tiers.drop("a")
    assert not tiers.holds("a") and tiers.digest_of("a-first") is None
    tiers.read("a", Path("a-second"))
    assert tiers.digest_of("a-first") is None and tiers.digest_of("a-second") == "a"
    tiers._placed.add("a")
    tiers.drop("a")
    assert tiers.digest_of("a-second") == "a", "its rows are there"
    tiers.evict("a")
    assert tiers.digest_of("a-second") is None
