"""Owns the store's lock: one open Store at a time; the kernel releases the lock when its process ends."""

import fcntl
import os
from functools import partial
from pathlib import Path
from weakref import ref

from adapters.errors import StoreLockedError

PID_WIDTH = 20


class FolderLock:
    """An exclusive lock on `path`, held until `release` (or the end of the process)."""

    def __init__(self, path: Path) -> None:
        """Take the lock, or raise StoreLockedError at once."""
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, PID_WIDTH, 0).decode("ascii", "replace").strip()
            self.release()
            by = f"process {holder}" if holder.isdigit() else "another process"
            raise StoreLockedError(
                f"the store {path.parent} is open in {by}, expected no other process: "
                "stop that server, or give this one a store of its own"
            ) from error
        except OSError:
            self.release()
            raise
        self._write_pid(self._descriptor)
        os.register_at_fork(after_in_child=partial(_let_go, ref(self)))

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def _write_pid(descriptor: int) -> None:
        """For the message above only: a full disk must not keep a store from opening, in which one could delete."""
        try:
            os.pwrite(descriptor, str(os.getpid()).ljust(PID_WIDTH).encode(), 0)
        except OSError:
            return


def _let_go(lock: "ref[FolderLock]") -> None:
    """In a forked child: the lock belongs to the parent, and must not outlive it in an engine that it started."""
    held = lock()
    if held is not None:
        held.release()
