"""Owns the audit log: who changed what, when and from where; one JSON object a line.

Invariant: a line is on the disk, whole, when `record` returns; the file only grows. A full disk stops no record of what
makes room: the log has a reserve beside it.
"""

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from perft.durable import sync
from server.auth.keys import Caller
from server.errors import AuditLogError, StartError

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

FULL = (errno.ENOSPC, errno.EDQUOT)
RESERVE_BYTES, RESERVE_STEP_BYTES = 256 * 1024, 32 * 1024
"""Of the file that keeps room for the log; given up step by step, so that not all of it is free for others at once."""
MAKES_NO_ROOM = ("upload",)

Detail = str | int | float | bool | None | list[str]


def _now() -> datetime:
    return datetime.now(UTC)


class AuditLog:
    """Appends to `path` (made with mode 0600), also after a rotation has moved the file away. Safe from any thread."""

    def __init__(self, path: Path, clock: Callable[[], datetime] = _now) -> None:
        self._path, self._clock = path, clock
        self._reserve, self._is_reserve_short = path.with_name(path.name + ".reserve"), True
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
                self._append_on_full_disk(line, may_use_reserve=action not in MAKES_NO_ROOM)
        except OSError as error:
            message = f"the audit log cannot be written, so the change was rejected ({error.strerror or error})"
            raise AuditLogError(message) from error

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        with self._lock:
            self._drop()

    def _append_on_full_disk(self, line: bytes, may_use_reserve: bool) -> None:
        """Append a line; a full disk gets as much of the reserve back as that takes."""
        while True:
            try:
                self._append(line)
                break
            except OSError as error:
                if error.errno not in FULL or not may_use_reserve or not self._give_up_reserve():
                    raise
        self._fill_reserve()

    def _give_up_reserve(self) -> bool:
        """Give a part of the reserve back to the disk; False if there is none."""
        self._is_reserve_short = True
        try:
            size = self._reserve.stat().st_size
            if not size:
                return False
            os.truncate(self._reserve, max(0, size - RESERVE_STEP_BYTES))
        except OSError:
            return False
        return True

    def _fill_reserve(self) -> None:
        """Take what is missing of the reserve, as far as the disk has it."""
        if not self._is_reserve_short:
            return
        with suppress(OSError):
            file = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                for size in range(RESERVE_STEP_BYTES, RESERVE_BYTES + 1, RESERVE_STEP_BYTES):
                    os.posix_fallocate(file, 0, size)
                self._is_reserve_short = False
            finally:
                os.close(file)

    def _append(self, line: bytes) -> None:
        file = self._current()
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        data = b"\n" + line if torn else line
        if os.write(file, data) != len(data):
            raise OSError(errno.ENOSPC, "only a part of the line was written")
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
            sync(self._path.parent)
            self._fill_reserve()
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
