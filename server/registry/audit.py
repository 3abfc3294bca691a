"""Owns the audit log: who changed what, when and from where; one JSON object a line.

Invariant: a line is on the disk, whole, when `record` returns; the file only grows.
"""

import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from server.auth.keys import Caller
from server.errors import AuditLogError, StartError

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

Detail = str | int | float | bool | None | list[str]


def _now() -> datetime:
    return datetime.now(UTC)


class AuditLog:
    """Appends to `path` (made with mode 0600), also after a rotation has moved the file away. Safe from any thread."""

    def __init__(self, path: Path, clock: Callable[[], datetime] = _now) -> None:
        self._path, self._clock = path, clock
        self._lock = Lock()
        self._file: int | None = None

    def open(self) -> None:
        """Open the file now. Raises StartError if it cannot be written."""
        try:
            with self._lock:
                self._current()
        except OSError as error:
            raise StartError(
                f"--audit-log {self._path}: cannot be written ({error.strerror or error}); every change is recorded "
                "there: make it writable, or name another file"
            ) from error

    def record(self, action: str, caller: Caller, **details: Detail) -> None:
        """Append one line and wait for the disk. Raises AuditLogError: a change without a record is not made."""
        entry: dict[str, Detail] = {
            "time": self._clock().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "action": action,
            "label": caller.label,
            "client": caller.client,
            "request_id": caller.request_id,
        }
        assert not entry.keys() & details.keys(), details
        line = json.dumps(entry | details, ensure_ascii=True).encode() + b"\n"
        try:
            with self._lock:
                self._append(line)
        except OSError as error:
            message = f"the audit log cannot be written, so the change was rejected ({error.strerror or error})"
            raise AuditLogError(message) from error

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        with self._lock:
            self._drop()

    def _append(self, line: bytes) -> None:
        file = self._current()
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        data = b"\n" + line if torn else line
        if os.write(file, data) != len(data):
            raise OSError("only a part of the line was written")
        os.fsync(file)

    def _current(self) -> int:
        """The open file, which is the one that `path` names now."""
        if self._file is not None and not _is_same(self._file, self._path):
            self._drop()
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, _FLAGS, 0o600)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                os.close(file)
                raise OSError("it is no regular file")
            self._file = file
            _sync_folder(self._path.parent)
        return self._file

    def _drop(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
