"""Owns the files of the adapters in an open store: staged, moved in by digest, removed.

Invariant: a folder in blobs/ has both its files, synced, from the moment it appears there to the moment it goes.
"""

import logging
from contextlib import suppress
from filecmp import cmp
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from adapters.format.config import parse_config
from adapters.format.folder import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from adapters.store.durable import Disk
from adapters.store.layout import Layout, blob_bytes, blob_problem

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class Blobs:
    """`sizes`: the bytes of every whole blob. `problems`: why the others that are wanted are not whole.

    Both tables are replaced, never changed: readers need no lock.
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
        """Remove what lies in staging/, if it is still there."""
        assert self._layout.staging in staged.parents, staged
        if staged.exists():
            self._remove(staged)

    def sync(self, folder: Path) -> None:
        """The slow part of an upload, done before anybody else has to wait. A README.md is dropped."""
        if (folder / README_FILE).exists():
            self._disk.remove_file(folder / README_FILE)
        assert blob_problem(folder) is None, folder
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self._disk.sync_file(folder / file)
        self._disk.sync_folder(folder)

    def damage(self, folder: Path, digest: str) -> str | None:
        """What became of the blob since it was found whole: `folder` has its content. Slow like `sync`, as early."""
        if digest not in self.sizes:
            return None
        blob = self._layout.blob(digest)
        try:
            return blob_problem(blob) or (None if _is_same(folder, blob) else "its files changed on the disk")
        except OSError as error:
            return f"cannot be read: {error}"

    def place(self, folder: Path, digest: str, damage: str | None) -> None:
        """Move a synced folder to its blob, unless a whole one is there. On an error the caller calls `drop`."""
        if digest in self.sizes and damage is not None:
            logger.error("store: blobs/%s: %s; the upload of the same content mends it", digest, damage)
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
        """Remove a blob that no record names. What fails here, the next opening of the store does."""
        self.sizes, self.problems = _without(self.sizes, digest), _without(self.problems, digest)
        blob = self._layout.blob(digest)
        with suppress(OSError):
            if blob.exists():
                self._to_trash(blob)

    def _to_trash(self, blob: Path) -> None:
        """Out of blobs/ in one step: a blob is never seen half removed."""
        trashed = self._layout.trash / uuid4().hex
        self._disk.move(blob, trashed)
        self._remove(trashed)

    def _remove(self, path: Path) -> None:
        try:
            self._disk.remove_tree(path)
        except OSError as error:
            logger.warning("store: %s stays until the store is opened again: %s", path, error)


def _is_same(folder: Path, blob: Path) -> bool:
    """Whether two folders have the content of one digest."""
    return cmp(folder / WEIGHTS_FILE, blob / WEIGHTS_FILE, shallow=False) and _meaning(folder) == _meaning(blob)


def _meaning(folder: Path) -> bytes:
    """What of a configuration the digest depends on."""
    raw = (folder / CONFIG_FILE).read_bytes()
    config, violations = parse_config(raw)
    return raw if config is None or violations else config.canonical_json()


def _without(table: dict[str, Value], key: str) -> dict[str, Value]:
    return {k: value for k, value in table.items() if k != key}
