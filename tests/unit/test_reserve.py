"""The room that the store and the audit log keep for what a full disk must not stop, on a disk that only says so."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import StorageFullError
from adapters.store import FolderStore, Store, verify_folder
from adapters.store.folder.durable import Disk
from adapters.store.folder.reserve import SLOT_BYTES
from server.auth.keys import Caller
from server.errors import AuditLogError
from server.registry import audit
from server.registry.audit import AuditLog
from tests.store_contents import perft, upload

CHANGES: dict[str, Callable[[Store], object]] = {
    "roll back": lambda store: store.update("a", active=1),
    "make private": lambda store: store.update("a", allowed_keys=["alice"]),
    "delete a version": lambda store: (store.start_delete("a", 1), store.finish_delete("a", 1)),
    "delete a name": lambda store: (store.start_delete("b", None), store.finish_delete("b", 1)),
}


class Full(Disk):
    """Takes no new file and no new folder once `is_full`; a file that has its room can be written again."""

    is_full = False

    def step(self, operation: str, path: Path) -> None:
        if self.is_full and operation in ("create", "make_folder"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.fixture
def full(tmp_path: Path) -> tuple[Store, Full]:
    disk = Full()
    store = FolderStore.open(tmp_path / "store", disk)
    for name, number in (("a", 1), ("a", 2), ("b", 3)):
        upload(store, name, perft(number))
    disk.is_full = True
    return store, disk


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_disk_does_not_stop_it(full: tuple[Store, Full], tmp_path: Path, change: str) -> None:
    store, _ = full
    CHANGES[change](store)
    assert verify_folder(tmp_path / "store") == []
    store.close()
    found = FolderStore.open(tmp_path / "store")
    a, b = found.get("a"), found.get("b")
    assert a is not None
    seen = (a.active, a.allowed_keys, [version.version for version in a.versions], b is None)
    assert (
        seen
        == {
            "roll back": (1, None, [1, 2], False),
            "make private": (2, ("alice",), [1, 2], False),
            "delete a version": (2, None, [2], False),
            "delete a name": (2, None, [1, 2], True),
        }[change]
    )


def test_it_stops_an_upload(full: tuple[Store, Full]) -> None:
    store, _ = full
    with pytest.raises(StorageFullError):
        store.stage()


def test_what_was_taken_is_made_again(full: tuple[Store, Full], tmp_path: Path) -> None:
    store, _ = full
    for number in range(20):
        store.update("a", active=1 + number % 2)
    sizes = [slot.stat().st_size for slot in (tmp_path / "store" / "reserve").iterdir()]
    assert len(sizes) > 1 and set(sizes) == {SLOT_BYTES}


def test_it_has_room_for_the_largest_record(full: tuple[Store, Full]) -> None:
    store, disk = full
    disk.is_full = False
    store.update("a", allowed_keys=[f"key-{number}" for number in range(40_000)])
    disk.is_full = True
    store.update("a", active=1)
    record = store.get("a")
    assert record is not None and record.active == 1


def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    os.umask(0o022)
    root = tmp_path / "store"
    store = FolderStore.open(root)
    upload(store, "a", perft(1))
    modes = {path: path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    store.close()
    root.chmod(0o755)  # as older versions made it
    FolderStore.open(root).close()
    assert root.stat().st_mode & 0o777 == 0o750


def test_the_audit_log_records_on_a_full_disk_what_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failed try of this disk gives nothing; it takes a line once something was given back."""
    log, caller = AuditLog(tmp_path / "audit.jsonl"), Caller("admin", is_admin=True)
    log.open()
    reserve = tmp_path / "audit.jsonl.reserve"
    assert reserve.stat().st_size == audit.RESERVE_BYTES
    write, fallocate, taken = os.write, os.posix_fallocate, reserve.stat().st_size

    def full_write(file: int, data: bytes) -> int:
        if reserve.stat().st_size >= taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    def full_fallocate(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(audit.os, "write", full_write)
    monkeypatch.setattr(audit.os, "posix_fallocate", full_fallocate)
    with pytest.raises(AuditLogError):
        log.record("upload", caller, name="a")
    for number in range(audit.RESERVE_BYTES // audit.RESERVE_STEP_BYTES):
        taken = reserve.stat().st_size
        log.record("delete", caller, name=f"a{number}")
    taken = 0
    with pytest.raises(AuditLogError):
        log.record("delete", caller, name="b")
    monkeypatch.setattr(audit.os, "write", write)
    monkeypatch.setattr(audit.os, "posix_fallocate", fallocate)
    log.record("delete", caller, name="c")
    assert reserve.stat().st_size == audit.RESERVE_BYTES
    assert (
        len((tmp_path / "audit.jsonl").read_text().splitlines()) == 1 + audit.RESERVE_BYTES // audit.RESERVE_STEP_BYTES
    )
