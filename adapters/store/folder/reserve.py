"""Owns room on the store's disk that is kept for what a full disk must not stop: a delete, which makes room, a
rollback, a restriction to some keys.

Invariant: what such a change writes takes the place of a file of the reserve, so nothing else can take that room first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path

FULL = (ENOSPC, EDQUOT)
SLOTS = 4
SLOT_BYTES, LEAST_BYTES = 128 * 1024, 4096
"""Of one file of the reserve: at first, and at least. It grows with the largest record that was written."""


class Reserve:
    """Files of `folder`, each of which can become one record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bytes, self._is_short, self._is_lent = SLOT_BYTES, True, False

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Around a change that may use the reserve."""
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False
            if self._is_short:
                self.fill()

    def slot(self, size: int) -> Path | None:
        """A file to put `size` bytes into, which is then moved to where they belong; None if there is none."""
        if not self._is_lent:
            return None
        self._is_short = True
        return next((slot for slot in self._slots() if slot.exists() and slot.stat().st_size >= size), None)

    def fit(self, size: int) -> None:
        """Have room for records of `size` bytes, from the next `fill` on."""
        while self._bytes < size * 5 // 4:
            self._bytes *= 2
            self._is_short = True

    def fill(self) -> None:
        """Take what is missing, as far as the disk has it."""
        self._is_short = False
        with suppress(OSError):
            self._folder.mkdir(0o700, exist_ok=True)
            for slot in self._slots():
                self._allocate(slot)

    def _allocate(self, slot: Path) -> None:
        descriptor = os.open(slot, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = self._bytes
            while size >= LEAST_BYTES:
                try:
                    return os.posix_fallocate(descriptor, 0, size)
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                self._is_short = True
                size //= 2
        finally:
            os.close(descriptor)

    def _slots(self) -> list[Path]:
        return [self._folder / str(number) for number in range(SLOTS)]
