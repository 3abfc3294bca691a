"""Owns the files of the adapters in an open store: staged, moved in by digest, removed.

Invariant: a folder in blobs/ has both its files, synced, from the moment it appears to the moment it is removed.
"""

import logging
from contextlib import suppress
from filecmp import cmp
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from adapters.format.files import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from adapters.identity import canonical_config
from adapters.store.durable import Disk
from adapters.store.layout import Layout, blob_bytes, blob_problem

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class Blobs:
    """sizes: of every whole blob, in bytes. problems: by digest, why a blob that a record names is not whole.

    Both dicts are replaced, never changed, so readers need no lock.
    """

    def __init__(self, layout: Layout, disk: Disk, sizes: dict[str, int], problems: dict[str, str]) -> None:
        self.sizes, self.problems = sizes, problems
        self._layout, self._disk = layout, disk

    def stage(self) -> Path:
        """A new empty folder inside the store."""
        path = self._layout.staging / uuid4().hex
        self._disk.make_folder(path)
        return path

    def discard(self, staged: Path) -> None:
        """Remove a folder in staging/, if it still exists."""
        assert self._layout.staging in staged.parents, staged
        if staged.exists():
            self._remove(staged)

    def sync(self, folder: Path) -> None:
        """Sync an upload, which is slow and therefore done before the lock is taken. A README.md is removed."""
        if (folder / README_FILE).exists():
            self._disk.remove_file(folder / README_FILE)
        assert blob_problem(folder) is None, folder
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self._disk.sync_file(folder / file)
        self._disk.sync_folder(folder)

    def damage(self, folder: Path, digest: str) -> str | None:
        """What happened to the blob since it was found whole: `folder` has its content. Slow like `sync`."""
        if digest not in self.sizes:
            return None
        blob = self._layout.blob(digest)
        try:
            return blob_problem(blob) or (None if _is_same(folder, blob) else "its files changed on the disk")
        except OSError as error:
            return f"cannot be read: {error}"

    def place(self, folder: Path, digest: str, damage: str | None) -> None:
        """Move a synced folder into blobs/, unless a whole blob is there. On an error the caller calls `drop`."""
        if digest in self.sizes and damage is not None:
            logger.error("store: blobs/%s: %s; the upload of the same content repairs it", digest, damage)
            self.sizes, self.problems = _without(self.sizes, digest), {**self.problems, digest: damage}
        if digest in self.sizes:
            return
        blob, size = self._layout.blob(digest), blob_bytes(folder)
        if blob.exists():
            self._to_trash(blob)
        self._disk.move(folder, blob)
        self._disk.sync_folder(self._layout.blobs)
        self.sizes = {**self.sizes, digest: size}
        self.problems = _without(self.problems, digest)

    def drop(self, digest: str) -> None:
        """Remove a blob that no record names. If that fails, the next opening of the store does it."""
        self.sizes, self.problems = _without(self.sizes, digest), _without(self.problems, digest)
        blob = self._layout.blob(digest)
        with suppress(OSError):
            if blob.exists():
                self._to_trash(blob)

    def _to_trash(self, blob: Path) -> None:
        """Move a blob out of blobs/ atomically: it is never seen half removed."""
        trashed = self._layout.trash / uuid4().hex
        self._disk.move(blob, trashed)
        self._remove(trashed)

    def _remove(self, path: Path) -> None:
        try:
            self._disk.remove_tree(path)
        except OSError as error:
            logger.warning("store: %s is removed only when the store is opened again: %s", path, error)


def _is_same(folder: Path, blob: Path) -> bool:
    """Whether two folders have contents of the same digest."""
    if not cmp(folder / WEIGHTS_FILE, blob / WEIGHTS_FILE, shallow=False):
        return False
    ours, theirs = ((path / CONFIG_FILE).read_bytes() for path in (folder, blob))
    return ours == theirs or canonical_config(ours) == canonical_config(theirs) is not None


def _without(table: dict[str, Value], key: str) -> dict[str, Value]:
    return {k: value for k, value in table.items() if k != key}
