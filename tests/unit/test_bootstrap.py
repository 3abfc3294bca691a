"""Setting up from nothing: every way it can fail is one clear sentence and exit code 1."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", PROJECT / "requirements" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("perft: ") and said.count("\n") == 1
    return said


def test_another_python_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_python()
    assert "found CPython 3.10, expected CPython 3.11, 3.12 or 3.13" in sentence(capsys)


@pytest.mark.parametrize(("minor", "said"), [(11, ""), (12, "using Python 3.12; the tested one is 3.11")])
def test_a_python_that_is_not_the_tested_one_is_named_and_used(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minor: int,
    said: str,
) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, minor, 1))
    bootstrap.check_python()
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)


def test_another_platform_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_platform()
    assert "found Linux on aarch64, expected Linux on x86_64" in sentence(capsys)


def test_everything_missing_is_named_with_its_packages(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "is_loadable", lambda library: False)
    monkeypatch.setattr(bootstrap, "is_importable", lambda module: False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 13, 1))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_needs(bootstrap.needs())
    said = sentence(capsys)
    assert "found no libnuma.so.1, lscpu, Python module ensurepip" in said
    assert "`apt-get install libnuma1 util-linux python3.13-venv`" in said
    assert "`dnf install numactl-libs util-linux python3`" in said


def test_what_is_there_is_not_asked_for(bootstrap: ModuleType) -> None:
    assert bootstrap.is_loadable("libc.so.6") and not bootstrap.is_loadable("libnothing-of-this-name.so.1")
    assert bootstrap.is_importable("venv") and not bootstrap.is_importable("nothing_of_this_name")
    bootstrap.check_needs([need for need in bootstrap.needs() if need.is_there()])


def test_a_machine_without_sysfs_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "SYSFS", tmp_path / "sys")
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_needs([])
    assert f"found no {tmp_path / 'sys'}" in sentence(capsys)


def test_the_machine_is_checked_before_anything_is_made(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "is_loadable", lambda library: False)
    with pytest.raises(SystemExit, match="1"):
        bootstrap.main(tmp_path / ".venv", ["cpu", "test"])
    assert "libnuma1" in sentence(capsys) and not list(tmp_path.iterdir())


def test_a_full_disk_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_disk(tmp_path, 10**9, "make room")
    assert f"found 0.1 GB free in {tmp_path}, expected 1 GB: make room" in sentence(capsys)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Failed to establish a new connection: [Errno 101]", "the package index cannot be reached"),
        ("ERROR: something else", "ERROR: something else"),
    ],
)
def test_what_pip_cannot_do_is_one_sentence(
    bootstrap: ModuleType, capsys: pytest.CaptureFixture[str], reason: str, expected: str
) -> None:
    with pytest.raises(SystemExit, match="1"):
        bootstrap.run([sys.executable, "-c", f"import sys; sys.exit({reason!r})"], "it could not be installed")
    assert expected in sentence(capsys)


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    """A real run against an index that is not there."""
    unreachable = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, PROJECT / "requirements" / "bootstrap.py", tmp_path / "venv", "cpu"],
        capture_output=True, text=True, check=False, env={**os.environ, **unreachable}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("perft: ") and done.stderr.count("\n") == 1
    assert "the package index cannot be reached; check the network" in done.stderr


def test_an_unchanged_environment_returns_at_once(bootstrap: ModuleType, tmp_path: Path) -> None:
    made_from(bootstrap, tmp_path)
    bootstrap.main(tmp_path, ["cpu"])
    assert {path.name for path in tmp_path.iterdir()} == {bootstrap.STAMP, "bin"}


def made_from(bootstrap: ModuleType, folder: Path) -> None:
    """Make `folder` look like an environment made from the locks as they are."""
    (folder / bootstrap.STAMP).write_text(json.dumps(bootstrap.digests(["cpu", "test"])))
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)


def test_an_environment_whose_python_is_gone_is_made_anew(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made_from(bootstrap, tmp_path)
    (tmp_path / "bin" / "python").unlink()
    (tmp_path / "bin" / "python").symlink_to("/nothing/of/this/name")
    assert bootstrap.installed(tmp_path) == {}
    made: list[bool] = []
    monkeypatch.setattr(bootstrap.venv, "create", lambda folder, with_pip: made.append(not folder.exists()))
    bootstrap.make_environment(tmp_path)
    assert made == [True]


def test_the_lock_has_what_builds_this_project() -> None:
    """From Python 3.12 on a new environment has no setuptools of its own."""
    lines = (PROJECT / "requirements" / "cpu.txt").read_text().splitlines()
    (pinned,) = (line.removeprefix("setuptools==") for line in lines if line.startswith("setuptools=="))
    assert int(pinned.split(".")[0]) >= 77


def test_a_machine_without_venv_is_told_what_to_install(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def cannot(folder: Path, with_pip: bool) -> None:
        folder.mkdir()
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(bootstrap.venv, "create", cannot)
    with pytest.raises(SystemExit, match="1"):
        bootstrap.make_environment(tmp_path / ".venv")
    assert f"install python3.{sys.version_info.minor}-venv" in sentence(capsys) and not (tmp_path / ".venv").exists()
