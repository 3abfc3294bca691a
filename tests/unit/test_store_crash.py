"""The store when something stops it: killed, without power, without space, at every single step of a long script.

A step is one call of `Disk.step`, so that whatever the store does to its folder is stopped at.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from adapters.errors import StorageFullError, StoreUnusableError
from adapters.store import BaseRecord, FolderStore, Store, verify_folder
from adapters.store.folder import lock
from adapters.store.folder.durable import Disk
from tests.store_contents import bytes_of, lora, perft, remove, table, upload

State = list[dict[str, Any]]
BASE_RECORD = BaseRecord(fingerprint=None, hidden_size=8, num_layers=1, moe_layers=(0,), num_experts=4, top_k=2)

SCRIPT: list[Callable[[Store], Any]] = [
    lambda store: upload(store, "a", perft(1)),
    lambda store: upload(store, "a", perft(2), activate=False),
    lambda store: upload(store, "b", perft(1, "b's own")),
    lambda store: store.update("a", active=2),
    lambda store: upload(store, "a", perft(1), activate=True),
    lambda store: store.update("b", allowed_keys=("x",), pinned=True),
    lambda store: store.start_delete("a", 2),
    lambda store: store.finish_delete("a", 2),
    lambda store: store.start_delete("b", None),
    lambda store: store.finish_delete("b", 1),
    lambda store: upload(store, "b", lora()),
    lambda store: store.start_delete("a", None),
    lambda store: upload(store, "a", perft(3)),
    lambda store: store.finish_delete("a", 1),
    lambda store: store.start_delete("b", None),
    lambda store: store.finish_delete("b", 2),
    lambda store: upload(store, "c", perft(2), allowed_keys=("y",)),
    lambda store: store.start_delete("c", None),
    lambda store: store.finish_delete("c", 1),
    lambda store: upload(store, "c", perft(2)),
    lambda store: store.adopt("c", [2], BASE_RECORD),
    lambda store: upload(store, "b", perft(2), allowed_keys=None),
]


class Fast(Disk):
    """For a crash that the operating system survives syncing makes no difference: only announced."""

    def sync_file(self, path: Path) -> None:
        self.step("sync_file", path)

    def sync_folder(self, path: Path) -> None:
        self.step("sync_folder", path)


class Counting(Fast):
    """Remembers the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, operation: str, path: Path) -> None:
        self.steps.append(operation)


@cache
def undisturbed() -> tuple[int, tuple[State, ...]]:
    """How many steps the opening and the script take, and the states before, between and after its changes."""
    with TemporaryDirectory() as name:
        disk = Counting()
        store = FolderStore.open(Path(name) / "store", disk)
        states = [table(store)]
        for change in SCRIPT:
            change(store)
            states.append(table(store))
        store.close()
        return len(disk.steps), tuple(states)


def check_after_a_crash(folder: Path, done: int) -> None:
    """Sound, everything acknowledged there, the change under way whole or not at all; and it can go on."""
    _, states = undisturbed()
    store = FolderStore.open(folder, Fast())
    assert verify_folder(folder) == [] and store.problems == []
    found = table(store)
    reached = done if found == states[done] else done + 1
    assert found == states[reached]
    assert store.bytes_used() == bytes_of(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["STORE.json", "lock", "secret", "blobs", "deleted", "names", "reserve", "staging", "trash"]
    )
    assert not list((folder / "staging").iterdir()) and not list((folder / "trash").iterdir())
    for change in SCRIPT[reached:]:
        change(store)
    assert table(store) == states[-1], "no number is lost or used twice"
    store.close()
    assert verify_folder(folder) == []


class Killed(Fast):
    """Ends the process, without a word, at a step."""

    def __init__(self, left: int) -> None:
        self.left = left

    def step(self, operation: str, path: Path) -> None:
        if self.left == 0:
            os._exit(9)
        self.left -= 1


def changes_until_killed(folder: Path, step: int) -> int:
    """Run the script in a child that dies at `step`; how many changes had returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = FolderStore.open(folder, Killed(step))
            for change in SCRIPT:
                change(store)
                os.write(writing, b".")
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        done = len(pipe.read())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "it was to be killed"
    return done


def test_killed_at_every_step(tmp_path: Path) -> None:
    steps, _ = undisturbed()
    seen = set()
    for step in range(steps):
        folder = tmp_path / str(step)
        done = changes_until_killed(folder, step)
        seen.add(done)
        check_after_a_crash(folder, done)
        shutil.rmtree(folder)
    assert seen == set(range(len(SCRIPT)))


class PowerLostError(BaseException):
    """The machine is off; nothing that follows reaches the disk."""


@dataclass
class Volatile(Disk):
    """A disk that keeps nothing but what was synced, the worst that a file system may do when the power goes.

    `files` and `folders` are what is on the platter, by inode; inodes are held open so that none is used twice.
    """

    root: Path
    left: int
    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    def step(self, operation: str, path: Path) -> None:
        if self.left <= 0:
            raise PowerLostError
        self.left -= 1

    def sync_file(self, path: Path) -> None:
        self.step("sync_file", path)
        self.files[self.inode(path)] = path.read_bytes()

    def sync_folder(self, path: Path) -> None:
        self.step("sync_folder", path)
        self.folders[self.inode(path)] = {entry.name: self.inode(entry) for entry in path.iterdir()}

    def inode(self, path: Path) -> int:
        self.held.append(os.open(path, os.O_RDONLY))
        return os.fstat(self.held[-1]).st_ino

    def restore(self, target: Path) -> None:
        """Write what is left of the store to `target`."""
        entries = self.folders.get(self.inode(self.root.parent), {})
        is_folder = {
            os.fstat(descriptor).st_ino: os.path.isdir(f"/proc/self/fd/{descriptor}") for descriptor in self.held
        }

        def write(inode: int, path: Path) -> None:
            if is_folder[inode]:
                path.mkdir()
                for name, inner in self.folders.get(inode, {}).items():
                    write(inner, path / name)
            else:
                path.write_bytes(self.files.get(inode, b""))

        if self.root.name in entries:
            write(entries[self.root.name], target)
        for descriptor in self.held:
            os.close(descriptor)


def test_power_lost_at_every_step(tmp_path: Path) -> None:
    steps, _ = undisturbed()
    for step in range(steps + 1):
        (tmp_path / str(step)).mkdir()
        disk, done = Volatile(tmp_path / str(step) / "store", step), 0
        try:
            store = FolderStore.open(disk.root, disk)
            for change in SCRIPT:
                change(store)
                done += 1
            store.close()
        except PowerLostError:
            pass
        disk.restore(tmp_path / "after")
        check_after_a_crash(tmp_path / "after", done)
        shutil.rmtree(tmp_path / "after")
        shutil.rmtree(disk.root.parent)


def test_folders_that_a_copy_left_out_are_made_again(tmp_path: Path) -> None:
    """Many tools do not copy empty folders; what is then put into the new ones survives as well."""
    disk = Volatile(tmp_path / "store", 10_000)
    FolderStore.open(disk.root, disk).close()
    for name in ("names", "deleted", "blobs", "staging", "trash"):
        (disk.root / name).rmdir()
    disk.sync_folder(disk.root)
    store = FolderStore.open(disk.root, disk)
    SCRIPT[0](store)
    store.close()
    disk.restore(tmp_path / "after")
    check_after_a_crash(tmp_path / "after", 1)


def test_a_missing_sync_would_be_noticed(tmp_path: Path) -> None:
    """The test above can fail: without syncs of folders the power takes everything."""

    class Careless(Volatile):
        def sync_folder(self, path: Path) -> None:
            if path != tmp_path:
                return
            super().sync_folder(path)

    disk = Careless(tmp_path / "store", 10_000)
    store = FolderStore.open(disk.root, disk)
    upload(store, "a", perft(1))
    store.close()
    disk.restore(tmp_path / "after")
    with pytest.raises(AssertionError):
        check_after_a_crash(tmp_path / "after", 1)


NEEDS_SPACE = ("make_folder", "create", "write", "sync_file", "sync_folder")


class Full(Fast):
    """Fails with `error` at a step: once, or from there on at every step that needs space."""

    def __init__(self, error: int, at: int, lasting: bool) -> None:
        self.error, self.at, self.lasting, self.count = error, at, lasting, 0

    def step(self, operation: str, path: Path) -> None:
        self.count += 1
        hit = self.count > self.at and operation in NEEDS_SPACE if self.lasting else self.count == self.at + 1
        if hit:
            raise OSError(self.error, os.strerror(self.error), str(path))


@pytest.mark.parametrize(
    ("error", "lasting"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)],
    ids=["ENOSPC-once", "ENOSPC-lasting", "EDQUOT-lasting", "EIO-once"],
)
def test_no_space_at_every_step(tmp_path: Path, error: int, lasting: bool) -> None:
    """The change that hits it is refused and leaves no trace, and goes through once there is space again."""
    steps, states = undisturbed()
    expected = StorageFullError if error in (errno.ENOSPC, errno.EDQUOT) else StoreUnusableError
    refused = 0
    for step in range(steps):
        disk, folder = Full(error, step, lasting), tmp_path / str(step)
        try:
            store = FolderStore.open(folder, disk)
        except expected:
            refused += 1
            check_after_a_crash(folder, 0)
            continue
        for done, change in enumerate(SCRIPT):
            try:
                change(store)
            except expected as caught:
                refused += 1
                assert str(folder) in str(caught) and table(store) == states[done]
                store = freed(store, folder, disk)
                assert verify_folder(folder) == [] and not list((folder / "staging").iterdir())
                if table(store) == states[done]:
                    change(store)
            assert table(store) == states[done + 1]
            assert store.bytes_used() <= bytes_of(folder), "a blob that fails to go stays until the next opening"
        store.close()
        check_after_a_crash(folder, len(SCRIPT))
        shutil.rmtree(folder)
    assert refused > steps / 2


def freed(store: Store, folder: Path, disk: Full) -> Store:
    """The store with space again: as it is, or opened again where it could not take back what it had begun."""
    disk.at, disk.lasting = 10**9, False
    before = table(store)
    try:
        store.update(before[0]["name"] if before else "none", pinned=before[0]["pinned"] if before else False)
    except KeyError:
        return store
    except StoreUnusableError as error:
        assert "could neither be finished nor rolled back" in str(error) and table(store) == before
        store.close()
        return FolderStore.open(folder, disk)
    return store


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`, 1 MiB in memory; False where this process may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)


class Filled(Disk):
    """Out of space on demand: stands in for a small disk where none can be mounted."""

    full = False

    def step(self, operation: str, path: Path) -> None:
        if self.full and operation in NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fill(path: Path) -> None:
    """Write until the disk is full to its last byte."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match=r"No space left"):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk(tmp_path: Path) -> None:
    """Refused whole; the store still opens there and reads; once something else is gone the upload goes through."""
    with small_disk(tmp_path) as real:
        folder, ballast, disk = tmp_path / "store", tmp_path / "ballast", Filled()
        store = FolderStore.open(folder, disk)
        upload(store, "a", perft(1))
        before = table(store)
        staged = perft(2).write(store.stage())
        fill(ballast) if real else setattr(disk, "full", True)
        with pytest.raises(StorageFullError, match=r"No space left on device.*free space or delete adapters"):
            store.add("a", staged, perft(2).digest, "PERFT", activate=True)
        assert table(store) == before and not staged.exists() and verify_folder(folder) == []
        store.close()
        store = FolderStore.open(folder, disk)
        assert table(store) == before and store.secret == (folder / "secret").read_bytes()
        ballast.unlink(missing_ok=True)
        disk.full = False
        assert upload(store, "a", perft(2))[0].active == 2
        remove(store, "a", 1)
        assert verify_folder(folder) == []
        store.close()


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the reason, and left alone; the check can still read it."""
    with small_disk(tmp_path) as real:
        folder = tmp_path / "store"
        store = FolderStore.open(folder)
        upload(store, "a", perft(1))
        store.close()
        if real:
            subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        else:
            monkeypatch.setattr(lock.os, "open", refuse)
        with pytest.raises(StoreUnusableError, match=r"Read-only file system.*expected a folder that the server may"):
            FolderStore.open(folder)
        monkeypatch.undo()
        assert verify_folder(folder) == []


def refuse(path: Path, *_: int) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
