"""Owns every change the store makes to the file system; `step` is called before each.

Invariant: once `write` or `sync_folder` has returned, their change survives a power failure; until then the old state
is intact.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp"


class Disk:
    """The file system, one step at a time. A subclass may observe, fail or stop any step."""

    def step(self, operation: str, path: Path) -> None:
        """Called before `operation` changes `path`."""

    def make_folder(self, path: Path) -> None:
        self.step("make_folder", path)
        path.mkdir()

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace the file at `path` durably: it holds either the old bytes or all of the new ones."""
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            self.step("create", temporary)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                self.step("write", temporary)
                file.write(data)
            self.sync_file(temporary)
            self.move(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self.sync_folder(path.parent)

    def sync_file(self, path: Path) -> None:
        self.step("sync_file", path)
        _sync(path)

    def sync_folder(self, path: Path) -> None:
        """Make the entries of `path` durable: what was created, moved in or removed there."""
        self.step("sync_folder", path)
        _sync(path)

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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
