"""Owns the contents of a log store that are on this machine: a folder of bounded size, filled when they are needed.

cache/blobs/<digest>/    the two files of an adapter, whole from the moment the folder appears
cache/staging/           uploads and downloads under way; emptied when the cache is opened

Invariant: a folder in blobs/ has the content of its digest, for it was computed when the files came.
"""

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from adapters.errors import StoreLockedError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.identity import content_digest, file_hash
from adapters.store.folder.layout import blob_bytes, blob_problem
from adapters.store.folder.lock import FolderLock
from adapters.store.records import is_digest

logger = logging.getLogger(__name__)
FOLDER_MODE = 0o700
MOST_FREE_BYTES = 2**30
"""Bytes of the disk, or a tenth of it, that the cache leaves to what is being staged."""


class OtherContentError(Exception):
    """Files came that are not those of the digest."""


def lock_of(root: Path) -> FolderLock:
    """The lock of the cache at `root`. Raises StoreLockedError."""
    try:
        return FolderLock(root / "lock")
    except StoreLockedError as error:
        raise StoreLockedError(
            f"the cache {root} is another server's, expected one for each: name another folder with --adapter-cache; "
            "the store is shared as it is"
        ) from error


class Cache:
    """The cache at `root`, of at most `most_bytes` (None: unbounded), but for what is in use. One process at a time."""

    def __init__(self, root: Path, most_bytes: int | None = None) -> None:
        self._blobs, self._staging = root / "blobs", root / "staging"
        root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        self._lock = lock_of(root)
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in (self._blobs, self._staging):
            folder.mkdir(FOLDER_MODE, exist_ok=True)
        self._most_bytes = most_bytes
        self._changing = threading.RLock()
        self._coming: dict[str, threading.Lock] = {}
        self._used: Counter[str] = Counter()
        self._sizes = {path.name: blob_bytes(path) for path in self._by_age() if self._is_whole(path)}

    def close(self) -> None:
        self._lock.release()

    @property
    def root(self) -> Path:
        return self._blobs.parent

    def folder(self, digest: str) -> Path:
        """Where a content is, if it is."""
        return self._blobs / digest

    def stage(self) -> Path:
        """A new empty folder, on a disk with room for what is to be put there, as far as the cache can give it."""
        with self._changing:
            self._make_room(0, min(MOST_FREE_BYTES, shutil.disk_usage(self._staging).total // 10))
        path = self._staging / uuid4().hex
        path.mkdir(FOLDER_MODE)
        return path

    def discard(self, staged: Path) -> None:
        """Remove a folder from `stage`, if it still exists."""
        assert self._staging in staged.parents, staged
        shutil.rmtree(staged, ignore_errors=True)

    def fetch(self, digest: str, size: int, bring: Callable[[Path], None]) -> Path:
        """The folder of a content; `bring` puts its two files, of `size` bytes, into a folder. Others who want the same
        one wait for it.

        Raises what `bring` raises, or OtherContentError.
        """
        with self._changing:
            if digest in self._sizes:
                self._touch(digest)
                return self.folder(digest)
            turn = self._coming.setdefault(digest, threading.Lock())
        with turn:
            if digest not in self._sizes:
                staged = self.stage()
                with self._changing:
                    self._make_room(size, size)
                try:
                    bring(staged)
                    if (found := _content_of(staged)) != digest:
                        raise OtherContentError(f"the files' digest is {found}, expected {digest}")
                    self.keep(staged, digest)
                finally:
                    self.discard(staged)
        with self._changing:
            self._coming.pop(digest, None)
        return self.folder(digest)

    def keep(self, folder: Path, digest: str) -> None:
        """Move a staged folder with the two files of that content into the cache, unless it is there."""
        with self._changing:
            if digest not in self._sizes:
                size = blob_bytes(folder)
                self._make_room(size)
                os.rename(folder, self.folder(digest))
                self._sizes[digest] = size

    @contextmanager
    def used(self, digest: str) -> Iterator[None]:
        """Keep a content while it is read."""
        with self._changing:
            self._used[digest] += 1
            self._touch(digest)
        try:
            yield
        finally:
            with self._changing:
                self._used[digest] -= 1
                if not self._used[digest]:
                    del self._used[digest]

    def is_whole(self, digest: str) -> bool:
        """Whether the files are there, and still what they were when they came (slow)."""
        try:
            return _content_of(self.folder(digest)) == digest
        except FileNotFoundError:
            return False

    def remove(self, digest: str) -> None:
        """Remove a content, if it is there."""
        with self._changing:
            self._sizes.pop(digest, None)
            shutil.rmtree(self.folder(digest), ignore_errors=True)

    def _make_room(self, size: int, free: int = 0) -> None:
        """Remove what was not used for the longest time, until `size` more bytes are within the bound, and `free` bytes
        of the disk are free."""
        for path in self._by_age():
            is_within = self._most_bytes is None or sum(self._sizes.values()) + size <= self._most_bytes
            if is_within and shutil.disk_usage(self._blobs).free >= free:
                return
            if path.name not in self._used:
                self.remove(path.name)

    def _by_age(self) -> list[Path]:
        return sorted(self._blobs.iterdir(), key=lambda path: path.stat().st_mtime)

    def _touch(self, digest: str) -> None:
        with suppress(OSError):
            os.utime(self.folder(digest))

    def _is_whole(self, path: Path) -> bool:
        """What is not whole is removed: it comes again when it is needed."""
        if is_digest(path.name) and blob_problem(path) is None:
            return True
        logger.warning("store: %s is not whole, and removed", path)
        shutil.rmtree(path, ignore_errors=True)
        return False


def _content_of(folder: Path) -> str | None:
    return content_digest((folder / CONFIG_FILE).read_bytes(), file_hash(folder / WEIGHTS_FILE))
