"""Owns the files of the adapters in an open store: staged, moved in by digest, removed.

Invariant: a folder in blobs/ has both its files, synced, from the moment it appears to the moment it is removed.
"""

import logging
from collections import deque
from contextlib import suppress
from filecmp import cmp
from pathlib import Path
from uuid import uuid4

from adapters.format.files import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from adapters.identity import canonical_config
from adapters.store.folder.durable import Disk
from adapters.store.folder.layout import Layout, blob_bytes, blob_problem

logger = logging.getLogger(__name__)


class Blobs:
    """sizes: of every whole blob, in bytes. problems: by digest, why a blob that a record names is not whole.

    bytes_used: the sum of the sizes. Readers look single digests up, and need no lock.
    """

    def __init__(self, layout: Layout, disk: Disk, sizes: dict[str, int], problems: dict[str, str]) -> None:
        self.sizes, self.problems = sizes, problems
        self.bytes_used = sum(sizes.values())
        self._layout, self._disk = layout, disk
        self._trashed: deque[Path] = deque()

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
            self._disk.make_private(folder / file)
            self._disk.sync_file(folder / file)
        self._disk.sync_folder(folder)

    def damage(self, folder: Path, digest: str) -> str | None:
        """What happened to the blob since it was found whole: `folder` has its content. Slow like `sync`."""
        if digest not in self.sizes:
            return None
        blob = self._layout.blob(digest)
        try:
            found = blob_problem(blob) or (None if _is_same(folder, blob) else "its files changed on the disk")
        except OSError as error:
            found = f"cannot be read: {error}"
        return found if digest in self.sizes else None  # its last owner may have been deleted meanwhile

    def place(self, folder: Path, digest: str, damage: str | None) -> None:
        """Move a synced folder into blobs/, unless a whole blob is there. On an error the caller calls `drop`."""
        if digest in self.sizes and damage is not None:
            logger.error("store: blobs/%s: %s; the upload of the same content repairs it", digest, damage)
            self._set_size(digest, None)
            self.problems[digest] = damage
        if digest in self.sizes:
            return
        blob, size = self._layout.blob(digest), blob_bytes(folder)
        if blob.exists():
            self._to_trash(blob)
        self._disk.move(folder, blob)
        self._disk.sync_folder(self._layout.blobs)
        self._set_size(digest, size)
        self.problems.pop(digest, None)

    def drop(self, digest: str) -> None:
        """Take a blob away that no record names; `purge` removes it. If that fails, the next opening does it."""
        self._set_size(digest, None)
        self.problems.pop(digest, None)
        blob = self._layout.blob(digest)
        with suppress(OSError):
            if blob.exists():
                self._to_trash(blob)

    def purge(self) -> None:
        """Remove what is in trash/: slow for large files, so the caller does not hold the lock."""
        while True:
            try:
                trashed = self._trashed.popleft()
            except IndexError:
                return
            self._remove(trashed)

    def _set_size(self, digest: str, size: int | None) -> None:
        self.bytes_used += (size or 0) - self.sizes.pop(digest, 0)
        if size is not None:
            self.sizes[digest] = size

    def _to_trash(self, blob: Path) -> None:
        """Move a blob out of blobs/ atomically: it is never seen half removed."""
        trashed = self._layout.trash / uuid4().hex
        self._disk.move(blob, trashed)
        self._trashed.append(trashed)

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
