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
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 12, 1))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_python()
    assert "found Python 3.12, expected 3.11" in sentence(capsys)


def test_a_full_disk_is_named(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))
    with pytest.raises(SystemExit, match="1"):
        bootstrap.check_disk(tmp_path / ".venv")
    assert "found 0.1 GB free" in sentence(capsys)


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
        capture_output=True, text=True, check=False, env={**os.environ, **unreachable}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("perft: ") and done.stderr.count("\n") == 1
    assert "the package index cannot be reached; check the network" in done.stderr


def test_an_unchanged_environment_returns_at_once(bootstrap: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "perft-locks.json").write_text(json.dumps(bootstrap.digests(["cpu", "test"])))
    bootstrap.main(tmp_path, ["cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["perft-locks.json"]


def test_a_machine_without_venv_is_told_what_to_install(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def cannot(folder: Path, with_pip: bool) -> None:
        folder.mkdir()
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(bootstrap.venv, "create", cannot)
    with pytest.raises(SystemExit, match="1"):
        bootstrap.make_environment(tmp_path / ".venv")
    assert "install python3.11-venv" in sentence(capsys) and not (tmp_path / ".venv").exists()
