"""Owns every change the store makes to the file system; `step` is called before each.

Invariant: once `write` or `sync_folder` has returned, their change survives a power failure; until then the old state
is intact.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from adapters.store.folder.reserve import FULL, Reserve
from perft.durable import sync

TEMPORARY = ".tmp"
FOLDER_MODE, FILE_MODE = 0o700, 0o600
"""Adapters are their tenants' own."""


class Disk:
    """The file system, one step at a time. A subclass may observe, fail or stop any step.

    reserve: room for changes that a full disk must not stop; none until there is a place for it.
    """

    reserve: Reserve | None = None

    def step(self, operation: str, path: Path) -> None:
        """Called before `operation` changes `path`."""

    def make_folder(self, path: Path) -> None:
        self.step("make_folder", path)
        path.mkdir(FOLDER_MODE)

    def write(self, path: Path, data: bytes) -> None:
        """Replace the file at `path` durably: it holds either the old bytes or all of the new ones. On a full disk they
        take the place of a file of the reserve, if it is lent."""
        try:
            self._write(path, data)
        except OSError as error:
            slot = self.reserve.slot(len(data)) if self.reserve is not None and error.errno in FULL else None
            if slot is None:
                raise
            self._write_in_place_of(slot, path, data)
        if self.reserve is not None:
            self.reserve.fit(len(data))

    def _write_in_place_of(self, slot: Path, path: Path, data: bytes) -> None:
        self.step("write", slot)
        with slot.open("r+b") as file:
            file.write(data)
            file.truncate()
        self.sync_file(slot)
        self.move(slot, path)
        self.sync_folder(path.parent)

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            self.step("create", temporary)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as file:
                self.step("write", temporary)
                file.write(data)
            self.sync_file(temporary)
            self.move(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self.sync_folder(path.parent)

    def make_private(self, path: Path) -> None:
        """Only the owner may read a file: an upload's, which was made with the process's usual mode."""
        self.step("make_private", path)
        path.chmod(FILE_MODE)

    def sync_file(self, path: Path) -> None:
        self.step("sync_file", path)
        sync(path)

    def sync_folder(self, path: Path) -> None:
        """Make the entries of `path` durable: what was created, moved in or removed there."""
        self.step("sync_folder", path)
        sync(path)

    def move(self, source: Path, target: Path) -> None:
        """Rename within the store; a file at `target` is replaced atomically."""
        self.step("move", target)
        os.replace(source, target)

    def remove_file(self, path: Path) -> None:
        self.step("remove_file", path)
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder (or file) that no record names any more; it may be gone already."""
        self.step("remove_tree", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
