"""What the server's user may not read or write is said before anything is loaded: what was found, expected, to do.

Root may do everything, so as root these tests take on another user's id meanwhile (the effective one).
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters.access import check_readable, explained, read_problem, write_problem
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.format.folder import DEFAULT_LIMITS
from adapters.store import FolderStore
from perft.operator.cpu.kernel_cache import kernel_folder
from server.client.commands import make_parser
from server.errors import StartError
from server.hosting.given import NamedFolder, check_folders
from server.settings.key_files import read_admin_key
from server.settings.model import Settings
from server.settings.paths import check_paths, model_problem
from server.settings.sources import config_problem
from tests.server.fakes import BASE
from tests.synthetic import write_adapter

NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[int]:
    """As a user who is not root; gives that user's id."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(NOBODY)
    try:
        yield NOBODY
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own are its user's alone."""
    path = Path(tempfile.mkdtemp()).resolve()
    path.chmod(0o755)
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", path], check=True)
    shutil.rmtree(path)


def close(path: Path) -> Path:
    path.chmod(0)
    return path


def said(path: Path, what: str, user: int, wanted: str, remedy: str) -> str:
    return (
        f"{path}: found a {what} of user {os.getuid()} with mode 0, expected one that this process, user {user}, may "
        f"{wanted}: run `{remedy}` (on the host, if it is mounted)"
    )


def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "file")
    (folder / "file").write_text("x")
    assert read_problem(folder / "file") is None
    close(folder / "file")
    with without_rights() as user:
        for path in (folder / "file", folder / "link"):
            expected = said(folder / "file", "file", user, "read", f"chmod -R a+rX {folder}/file")
            assert read_problem(path) == expected
        assert (read_problem(folder / "file", "do that") or "").endswith(
            "run `do that` (on the host, if it is mounted)"
        )
        with pytest.raises(PermissionError) as denied:
            check_readable(folder / "file")
        assert explained(denied.value) == expected
        with pytest.raises(PermissionError) as denied:
            (folder / "file").read_text()
        assert explained(denied.value) == expected


def test_a_folder_that_may_not_be_entered_is_named_itself(folder: Path) -> None:
    (folder / "closed/a/b").mkdir(parents=True)
    close(folder / "closed")
    with without_rights() as user:
        for path in (folder / "closed/a/b", folder / "closed/missing"):
            expected = said(folder / "closed", "folder", user, "enter", f"chmod a+x {folder}/closed")
            assert read_problem(path) == expected == write_problem(path)
        assert read_problem(folder / "closed") == said(
            folder / "closed", "folder", user, "read", f"chmod -R a+rX {folder}/closed"
        )


def test_what_is_not_there_is_no_matter_of_rights(folder: Path) -> None:
    (folder / "file").touch()
    with without_rights():
        for path in (folder / "missing", folder / "missing/too", folder / "file/below", folder, Path("/")):
            assert read_problem(path) is None


def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    (folder / "kept").mkdir(0)
    (folder / "file").touch()
    assert write_problem(folder / "new/store") is None and write_problem(folder / "file") is None
    with without_rights() as user:
        closed = folder / "kept"
        assert write_problem(closed) == said(closed, "folder", user, "write to", f"chown -R {user} {closed}")
        found = write_problem(Path("/not-there/store")) or ""
        assert found.startswith("/: found a folder of user 0 ")
        assert f"run `mkdir -p /not-there/store && chown -R {user} /not-there/store`" in found


def test_a_file_system_that_is_read_only(folder: Path) -> None:
    """Root may write everywhere but there."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:  # not this user's to mount: the same place, closed by its mode
        folder.chmod(0o500)
        assert "write to" in (write_problem(folder / "store") or "")
        return
    try:
        found = write_problem(folder / "store")
    finally:
        subprocess.run(["umount", folder], check=True)
    where = folder / "store"
    assert found == f"{where}: found a read-only file system there, expected one to write to: mount a volume there"


@pytest.fixture
def adapter(folder: Path) -> Path:
    """An adapter as a trainer may leave it: in a folder below the one that is given."""
    write_adapter(folder / "given", BASE, 0)
    for file in (folder / "given").iterdir():
        file.chmod(0o644)
    return folder / "given"


@pytest.mark.parametrize(
    ("closed", "what", "wanted"),
    [(WEIGHTS_FILE, "file", "read"), (CONFIG_FILE, "file", "read"), ("", "folder", "read"), ("..", "folder", "enter")],
)
def test_an_adapter_that_may_not_be_read(adapter: Path, closed: str, what: str, wanted: str) -> None:
    """As those that safetensors wrote (mode 600), mounted into a container."""
    path = close((adapter / closed).resolve())
    named, given = NamedFolder("maths", adapter), ["push", "maths", str(adapter)]
    with without_rights() as user:
        remedy = f"chmod a+x {path}" if wanted == "enter" else f"chmod -R a+rX {adapter}"
        expected = said(path, what, user, wanted, remedy)
        with pytest.raises(StartError) as refused:
            check_folders([named], BASE, DEFAULT_LIMITS)
        assert str(refused.value) == f"--adapter maths: {expected}"
        with pytest.raises(SystemExit):
            make_parser().parse_args(given)
    path.chmod(0o755)
    with without_rights():
        check_folders([named], BASE, DEFAULT_LIMITS)


def test_a_subfolder_that_may_not_be_read_is_said_too(folder: Path, adapter: Path) -> None:
    close(adapter)
    with without_rights() as user, pytest.raises(StartError) as refused:
        check_folders([NamedFolder("maths", folder)], BASE, DEFAULT_LIMITS)
    assert f"{adapter}: found a folder of user {os.getuid()} with mode 0" in str(refused.value)
    assert f"user {user}, may enter" in str(refused.value)


def test_a_model_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM says that there is no such file, or no such repository."""
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "optimizer.pt"):
        (model / name).touch()
    close(model / "optimizer.pt")
    monkeypatch.chdir(folder)
    with without_rights():
        assert model_problem(str(model)) is model_problem("model") is model_problem("org/other") is None
    close(model / "model-00001-of-00002.safetensors")
    with without_rights() as user:
        shard = model / "model-00001-of-00002.safetensors"
        assert model_problem(str(model)) == said(shard, "file", user, "read", f"chmod -R a+rX {model}")
        assert "chmod -R a+rX model" in (model_problem("model") or "")
    close(model)
    with without_rights() as user:
        assert model_problem(str(model)) == said(model, "folder", user, "read", f"chmod -R a+rX {model}")


def settings(folder: Path, **values: object) -> Settings:
    return Settings(**{"adapter_store": folder / "data/store", "adapter_cache": folder / "data/cache"} | values)


@pytest.mark.parametrize(
    ("closed", "values", "flag"),
    [
        ("", {}, "--adapter-store"),
        ("store", {}, "--adapter-store"),
        ("store/names", {}, "--adapter-store"),
        ("store/names/a.json", {}, "--adapter-store"),
        ("store/lock", {}, "--adapter-store"),
        ("log", {"audit_log": "{data}/log/audit.jsonl"}, "--audit-log"),
        ("cache", {"adapter_store": "file://{data}/shared"}, "--adapter-cache"),
        ("shared", {"adapter_store": "file://{data}/shared"}, "--adapter-store"),
    ],
)
def test_a_place_that_may_not_be_written(folder: Path, closed: str, values: dict[str, str], flag: str) -> None:
    """All of it belongs to the server's user but for one place, as after a start as another user."""
    data = folder / "data"
    for name in ("log", "cache", "shared"):
        (data / name).mkdir(parents=True)
    FolderStore.open(data / "store").close()
    (data / "store/names/a.json").write_text("{}")
    chosen = settings(folder, **{name: value.format(data=data) for name, value in values.items()})
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", str(NOBODY), data], check=True)
    with without_rights():
        check_paths("org/model", chosen)
    path = close(data / closed)
    if os.geteuid() == 0:
        os.chown(path, 0, 0)
    with without_rights() as user, pytest.raises(StartError) as refused:
        check_paths("org/model", chosen)
    lines = str(refused.value).splitlines()
    assert all(f": {path}: found a " in line and f"user {user}, may" in line for line in lines), lines
    assert any(line.startswith(flag) for line in lines), lines


def test_all_that_cannot_be_used_is_said_at_once(folder: Path) -> None:
    (folder / "model").mkdir(0)
    (folder / "data").mkdir(0)
    with without_rights(), pytest.raises(StartError) as refused:
        check_paths(str(folder / "model"), settings(folder))
    model, store = str(refused.value).splitlines()
    assert model.startswith(f"{folder}/model: found") and store.startswith(f"--adapter-store: {folder}/data: found")


def test_files_of_settings_and_keys_are_not_opened_to_all(folder: Path) -> None:
    """What is to be done with a file that holds keys lets nobody else read it."""
    (folder / "file").write_text("a-long-enough-key")
    close(folder / "file")
    with without_rights() as user:
        expected = said(folder / "file", "file", user, "read", f"chown {user} {folder}/file")
        assert config_problem(folder / "file") == f"--perft-config {expected}"
        with pytest.raises(ValueError, match="found a file of user") as refused:
            read_admin_key(folder / "file")
        assert str(refused.value) == expected


def test_kernels_are_kept_without_a_home(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """And no folder of the name ~ is made where the process happens to stand."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(close(folder) / "home"))
    with without_rights():
        found = kernel_folder()
        assert found.parent == Path(tempfile.gettempdir())
        found.rmdir()
