"""No process of the engine outlives its parent: chains of processes whose first one is killed, however they started."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.server.processes import wait_until


@contextmanager
def chain(
    method: str, *names: str, does: str = "sleep"
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A process with children of these names, each started by the one before; all are told to end with their parent."""
    first = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.process_chain", method, does, *names],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started: list[psutil.Process] = []
    try:
        assert first.stdout is not None
        started += [psutil.Process(int(pid)) for pid in first.stdout.readline().split()]
        assert len(started) == len(names)
        yield first, started
    finally:
        for process in (first, *started):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        first.wait()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP])
def test_the_whole_chain_ends_with_its_first(method: str, number: signal.Signals) -> None:
    with chain(method, "EngineCore", "VllmWorker-0") as (first, started):
        os.kill(first.pid, number)
        wait_until(lambda: all(is_gone(process) for process in started))


def test_a_forked_chain_too_where_plugins_do_not_run_again() -> None:
    with chain("fork", "EngineCore", "VllmWorker-0", does="inherit") as (first, started):
        first.kill()
        wait_until(lambda: all(is_gone(process) for process in started))


@pytest.mark.parametrize("does", ["busy", "stopped"])
def test_also_in_the_middle_of_a_step_and_while_it_is_stopped(does: str) -> None:
    with chain("spawn", "EngineCore", does=does) as (first, started):
        if does == "stopped":
            started[0].suspend()
        first.kill()
        wait_until(lambda: is_gone(started[0]))


def test_a_worker_ends_with_the_engine_core() -> None:
    with chain("spawn", "EngineCore", "VllmWorker-0") as (first, (core, worker)):
        core.kill()
        wait_until(lambda: is_gone(worker))
        assert first.poll() is None


def test_processes_of_others_are_left_alone() -> None:
    """A program that runs vLLM inside a process of its own."""
    with chain("spawn", "Process-1") as (first, started):
        first.kill()
        first.wait()
        with pytest.raises(psutil.TimeoutExpired):
            started[0].wait(1.0)
