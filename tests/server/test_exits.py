"""How `perft serve` ends: with which status and words, by what happened and when; and which plugins it starts with."""

import asyncio
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from server import cli
from server.api.dependencies import Lifecycle
from server.app import serve
from server.engine import health as health_module
from server.engine.health import EngineHealth
from server.errors import ServerDiedError, StartError, StartFailedError
from server.hosting import process as process_module
from server.hosting.environment import prepare_environment
from server.hosting.process import SignalHandler
from server.hosting.run import EXIT_DIED, Run
from tests.server.fake_server import settings_of
from tests.server.test_drain import App, Interrupted, ask, closed, on_a_real_loop, until
from tests.server.test_engine_health import FakeProcesses

DEATH = "the engine died: process EngineCore (7) was killed by SIGKILL"
ENDS: dict[str, tuple[BaseException | None, Run, int, str]] = {
    "asked": (None, Run(has_started=True), 0, ""),
    "Ctrl-C": (KeyboardInterrupt(), Run(True), 0, ""),
    "a signal during the start": (SystemExit(0), Run(), 0, ""),
    "engine died, then a signal": (SystemExit(0), Run(False, DEATH), EXIT_DIED, DEATH),
    "refused": (StartError("no"), Run(), 1, "perft: refused to start:\nno"),
    "taken": (OSError(98, "in use"), Run(), 1, "perft: refused to start:\nport 8000 of 127.0.0.1 is taken"),
    "not started": (RuntimeError("core"), Run(), 1, "perft: failed to start:\nvLLM ended: core"),
    "failed long after the start": (RuntimeError("late"), Run(True), EXIT_DIED, "ended by itself: RuntimeError: late"),
    "an OSError after the start": (OSError(98, "late"), Run(True), EXIT_DIED, "ended by itself: OSError"),
    "engine died": (None, Run(True, DEATH), EXIT_DIED, f"perft: the server ended by itself: {DEATH}"),
    "engine died, and vLLM stumbled": (RuntimeError("x"), Run(True, DEATH), EXIT_DIED, DEATH),
    "engine died before it listened": (KeyboardInterrupt(), Run(False, DEATH), EXIT_DIED, DEATH),
}


@pytest.mark.parametrize("what", ENDS)
def test_the_status_says_how_it_ended(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (raised, run, status, said), settings = ENDS[what], settings_of(tmp_path / "store")

    async def serve_vllm(args: Namespace, **options: Any) -> None:
        if raised is not None:
            raise raised

    def only_run(argv: list[str]) -> None:
        serve.run(Namespace(perft_run=run, perft_settings=settings, host="127.0.0.1", port=8000))
        raise SystemExit(0)

    monkeypatch.setattr(serve, "serve_vllm", serve_vllm)
    monkeypatch.setattr(serve, "serve", only_run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "model"])
    assert ended.value.code == status
    error = capfd.readouterr().err
    assert said in error and ("to start" in error) == (status == 1)


def test_a_process_that_cannot_end_is_ended() -> None:
    """Whatever hangs: here the main thread, in a call that nothing interrupts."""
    code = "import threading; from server.hosting import run; run.LAST_EXIT_S = 0.2; run.Run().engine_died('x'); "
    code += "threading.Event().wait(3600)"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=300)
    assert done.returncode == EXIT_DIED


def test_a_signal_during_the_start_ends_it_though_its_exception_is_swallowed() -> None:
    """And a second signal does not interrupt the end."""
    code = """
import os, signal, threading
from server.hosting import starting
starting.LAST_EXIT_S = 0.2
starting.end_on_signals()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
    try:
        os.kill(os.getpid(), number)
    except SystemExit:
        print("asked", flush=True)
threading.Event().wait(3600)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=300, capture_output=True, text=True)
    said = "perft: SIGINT: the server is ending before it was ready\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", said)


def test_a_signal_during_the_start_ends_it_though_python_drops_its_exception() -> None:
    """It does so in what runs at a fork: logging has such hooks."""
    code = """
import os, signal, threading
from server.hosting import starting
starting.LAST_EXIT_S = 3600
starting.end_on_signals()
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
if os.fork() == 0:
    os._exit(0)
print("goes on", flush=True)
threading.Event().wait(3600)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=300, capture_output=True, text=True)
    said = "perft: SIGINT: the server is ending before it was ready\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "TICK_S", 0.01)
    monkeypatch.setattr(health_module, "CONFIRM_S", 0.02)
    monkeypatch.setattr(process_module, "LAST_ANSWERS_S", 0.3)


def watched(lifecycle: Lifecycle, processes: FakeProcesses) -> tuple[SignalHandler, list[str]]:
    """A handler that watches an engine, and what it said died."""
    health, died = EngineHealth(3600.0, processes), list[str]()
    health.start()
    handler = SignalHandler(lifecycle, 3600.0, closed)
    handler.install()
    handler.watch(health, died.append)
    return handler, died


@on_a_real_loop
async def test_the_death_of_the_engine_ends_the_server() -> None:
    interrupted, lifecycle, app, processes = Interrupted(), Lifecycle(), App(), FakeProcesses()
    _, died = watched(lifecycle, processes)
    running = asyncio.create_task(ask(app, lifecycle))  # a client that does not read its end keeps nothing
    await until(lambda: lifecycle.responses_running == 1)
    processes.dead = True
    await until(lambda: lifecycle.is_draining)
    refused = await ask(app, lifecycle)
    assert refused[0]["status"] == 503 and b"was killed by SIGKILL" in refused[1]["body"]
    assert b'"engine_unavailable"' in refused[1]["body"] and not interrupted.event.is_set()
    await interrupted.event.wait()
    assert died == [DEATH]
    running.cancel()
    interrupted.leave()


@on_a_real_loop
async def test_while_it_drains_too() -> None:
    interrupted, lifecycle, app, processes = Interrupted(), Lifecycle(), App(), FakeProcesses()
    _, died = watched(lifecycle, processes)
    running = asyncio.create_task(ask(app, lifecycle))
    await until(lambda: lifecycle.responses_running == 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: lifecycle.is_draining)
    processes.dead = True
    await interrupted.event.wait()
    assert died == [DEATH]
    running.cancel()
    interrupted.leave()


@on_a_real_loop
async def test_a_signal_to_all_processes_is_no_death() -> None:
    """As a service manager sends it: the engine ends by itself, and the server as it was asked to."""
    interrupted, lifecycle, app, processes = Interrupted(), Lifecycle(), App(), FakeProcesses(asked=True)
    _, died = watched(lifecycle, processes)
    running = asyncio.create_task(ask(app, lifecycle))
    await until(lambda: lifecycle.responses_running == 1)
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: lifecycle.is_draining)
    processes.dead = True
    app.let.set()
    await interrupted.event.wait()
    assert (await running)[0]["status"] == 200 and died == []
    interrupted.leave()


def install(folder: Path, package: str, **points: list[str]) -> None:
    """An installed distribution with entry points, by group (`__` for the dot)."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines: list[str] = []
    for group, names in points.items():
        lines += [f"[{group.replace('__', '.')}]", *(f"{name} = {package}:register" for name in names)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        (None, ["stats", "their_platform", "theirs"], "their_platform (other), theirs (other)"),
        ("", [], None),
        ("theirs", ["theirs"], None),
        ("routes,perft", ["routes"], None),
    ],
)
def test_the_plugins_of_others_load_as_without_us(
    given: str | None,
    expected: list[str],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All of them where nobody chooses, except those of endpoints: vLLM loads those only where they are named."""
    groups: dict[str, Any] = {"vllm__general_plugins": ["theirs", "both"], "vllm__platform_plugins": ["their_platform"]}
    groups |= {"vllm__stat_logger_plugins": ["stats"], "vllm__endpoint_plugins": ["routes", "both"], "x__y": ["no"]}
    install(tmp_path, "other", **groups)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_PLUGINS", None)
    if given is not None:
        os.environ["VLLM_PLUGINS"] = given
    prepare_environment()
    own = ["perft", "perft_server"]
    vllms = [] if given is not None else ["lora_filesystem_resolver", "lora_hf_hub_resolver"]
    found = os.environ["VLLM_PLUGINS"].split(",")
    assert sorted(found) == sorted([*expected, *vllms, *own])
    error = capfd.readouterr().err
    assert said is None or said in error
    assert ("plugins of other packages" in error) == (said is not None)


def test_each_kind_of_end_has_its_words() -> None:
    assert (StartError.headline, StartFailedError.headline) == ("refused to start", "failed to start")
    assert not issubclass(ServerDiedError, StartError)


def test_the_demo_becomes_the_server(tmp_path: Path) -> None:
    """One process from then on: what kills it kills the server, and the status is the server's."""
    code = "import os, sys; from server.demo import __main__ as demo; print(os.getpid(), flush=True); "
    code += "demo.build = lambda folder: None; demo.serve_arguments = lambda base, port: ['serve']; "
    code += "sys.argv = ['demo', '--port', '0']; demo.main()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PERFT_ADMIN_KEY": "a-key-of-some-length"}
    demo = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    said, error = demo.communicate(timeout=300)
    assert said.splitlines()[0] == str(demo.pid)
    assert demo.returncode == 1 and error.startswith("perft: refused to start:\nfound no model"), error
