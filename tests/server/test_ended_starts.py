"""A server that is told to end, or killed, while it starts: it does so at once, and no process is left."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess, launch, processes_of, wait_until


@pytest.fixture
def starting(tiny_model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    running = launch(tiny_server.serve_arguments(tiny_model, tmp_path / "store", 0), 0, tmp_path / "server.log")
    yield running
    for pid in processes_of(running):
        os.kill(pid, signal.SIGKILL)


def imports(pid: int, command: str) -> bool:
    """Whether this process of that command has begun to import: it has torch."""
    try:
        return command in command_of(pid) and "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


def server_imports(server: ServerProcess) -> bool:
    return imports(server.process.pid, "serve")


def engine_imports(server: ServerProcess) -> bool:
    """The server waits for the engine's first word."""
    return any(imports(pid, "spawn_main") for pid in processes_of(server))


def engine_loads(server: ServerProcess) -> bool:
    """The engine has been told what to load: vLLM has named its process."""
    return any("EngineCore" in command_of(pid) for pid in processes_of(server))


def engine_is_up(server: ServerProcess) -> bool:
    """The server's loop runs: it has started what compiles grammars."""
    return any("structured_outputs.child" in command_of(pid) for pid in processes_of(server))


MOMENTS = {
    "SIGTERM while it imports": (signal.SIGTERM, server_imports),
    "SIGTERM while the engine imports": (signal.SIGTERM, engine_imports),
    "SIGHUP while the engine loads": (signal.SIGHUP, engine_loads),
    "SIGINT while the server puts its parts together": (signal.SIGINT, engine_is_up),
}


@pytest.mark.parametrize("what", MOMENTS)
def test_a_signal_ends_the_start(what: str, starting: ServerProcess) -> None:
    number, comes = MOMENTS[what]
    wait_until(lambda: comes(starting), pause_s=0.01)
    starting.process.send_signal(number)
    log = starting.log
    wait_until(lambda: starting.process.poll() is not None or "PERFT is serving" in log.read_text(errors="replace"))
    assert starting.process.poll() == 0, log.read_text()[-3000:]
    wait_until(lambda: processes_of(starting) == {})
    said = log.read_text(errors="replace")
    assert "Traceback" not in said and f"perft: {number.name}: the server is ending" in said.splitlines()[-1]


def test_the_engine_of_a_killed_start_does_not_wait_for_it(starting: ServerProcess) -> None:
    wait_until(lambda: engine_imports(starting), pause_s=0.01)
    starting.process.kill()
    starting.process.wait()
    wait_until(lambda: processes_of(starting) == {})
    assert "front-end process" not in starting.log.read_text(errors="replace")  # vLLM's patience with it: minutes
