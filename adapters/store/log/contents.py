"""Owns the files of adapters in a shared store: put there under keys that were never used, brought to this machine.

Invariant: what `fetch` returns is the content of its digest. Files are removed by the server that wrote that nobody
needs them; what that leaves is swept.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from uuid import uuid4

from adapters.errors import StorageFullError, StoreUnusableError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.log.cache import Cache, OtherContentError
from adapters.store.log.entries import BLOBS, PROBES, Upload, blob_key
from adapters.store.log.objects import Objects

logger = logging.getLogger(__name__)
FILES = (CONFIG_FILE, WEIGHTS_FILE)
DAMAGED = "damaged"
"""Beside the files of an upload that a server found damaged: the next upload of the same content, on whichever server,
takes its place. Until then each server judges by what it gets itself."""
ORPHAN_AGE_S = 24 * 3600.0
"""Files of an upload that no entry names after a day are of one that was broken off."""


class Contents:
    """problems: by digest, why its files cannot be used. Methods raise OSError."""

    def __init__(self, objects: Objects, cache: Cache) -> None:
        self.problems: dict[str, str] = {}
        self._objects, self._cache = objects, cache
        self._unused: dict[Path, tuple[str, str]] = {}

    def find_problems(self, uploads: Mapping[str, Upload]) -> None:
        """Look at all files, by their names and sizes."""
        sizes = {found.key: found.size for found in self._objects.list(BLOBS)}
        found = {digest: _problem(digest, upload, sizes) for digest, upload in uploads.items()}
        self.problems = {digest: problem for digest, problem in found.items() if problem is not None}
        for digest, problem in self.problems.items():
            logger.error("store: %s%s: %s", BLOBS, digest, problem)

    def damage(self, digest: str, upload: Upload) -> str | None:
        """What is wrong with a content's files where they are kept."""
        sizes = {found.key: found.size for found in self._objects.list(f"{BLOBS}{digest}/{upload.id}/")}
        if blob_key(digest, upload.id, DAMAGED) in sizes:
            return "a server found its files damaged"
        return self.problems.get(digest) or _problem(digest, upload, sizes)

    def put(self, folder: Path, digest: str) -> str:
        """Copy a content's files there. Returns the id of this upload, which `discard` removes unless it was used."""
        upload = uuid4().hex
        self._unused[folder] = (digest, upload)
        for file in FILES:
            self._objects.put_file(blob_key(digest, upload, file), folder / file)
        return upload

    def keep(self, folder: Path, digest: str) -> None:
        """The staged folder of a new version: this machine needs no copy of it from elsewhere."""
        try:
            self._cache.keep(folder, digest)
        except OSError as error:
            logger.warning("store: %s is fetched again when it is needed: %s", digest, error)

    def used(self, folder: Path, digest: str) -> None:
        """The upload of a staged folder is that of a version now, or may be: it stays."""
        self._unused.pop(folder, None)
        self.problems.pop(digest, None)

    def discard(self, staged: Path) -> None:
        """Remove a staged folder, and an upload from there that no version has."""
        for folder in [each for each in list(self._unused) if staged in (each, *each.parents)]:
            self.remove(*self._unused.pop(folder))
        self._cache.discard(staged)

    def fetch(self, digest: str, upload: Upload | None) -> Path:
        """The folder on this machine. Raises StoreUnusableError if the files are not of that content."""

        def bring(folder: Path) -> None:
            if upload is None:
                raise StoreUnusableError(f"the store {self._objects} has no files of {digest}")
            for file in FILES:
                self._objects.get_file(blob_key(digest, upload.id, file), folder / file)

        try:
            folder = self._cache.fetch(digest, 0 if upload is None else upload.size_bytes, bring)
        except OtherContentError as error:
            assert upload is not None
            self.problems[digest] = str(error)
            with suppress(OSError):
                self._objects.create(blob_key(digest, upload.id, DAMAGED), b"")
            place = f"{str(self._objects).rstrip('/')}/{BLOBS}{digest}/{upload.id}/"
            raise StoreUnusableError(
                f"{place}: {error}: it was changed where it is kept; upload the adapter again"
            ) from None
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise StorageFullError(
                    f"{self._cache.root}: fetching {digest}: {error}; free space there, or start with --adapter-cache "
                    "on another disk"
                ) from error
            raise
        self.problems.pop(digest, None)
        return folder

    def drop_damaged(self, digest: str) -> bool:
        """Remove a copy on this machine that is not what it was when it came; False if it is (slow)."""
        if self._cache.is_whole(digest):
            return False
        logger.error("store: %s: %s was damaged, and is fetched again", self._cache.root, digest)
        self._cache.remove(digest)
        return True

    def forget(self, digest: str) -> None:
        """No version has this content any more."""
        self._cache.remove(digest)
        self.problems.pop(digest, None)

    def remove(self, digest: str, upload: str) -> None:
        """Remove the files of an upload that nobody needs."""
        try:
            for file in (*FILES, DAMAGED):
                self._objects.remove(blob_key(digest, upload, file))
        except OSError as error:
            logger.warning("store: files of %s stay until they are swept: %s", digest, error)

    def sweep(self, uploads: Mapping[str, Upload], now: Callable[[], float] | None) -> int:
        """Remove files of uploads that were broken off; `uploads` are in use. Returns how many objects went."""
        removed, latest = 0, (now or self._now)() - ORPHAN_AGE_S
        for found in self._objects.list(BLOBS):
            digest, upload = found.key.split("/")[1:3]
            known = uploads.get(digest)
            if (known is None or known.id != upload) and found.modified < latest:
                self._objects.remove(found.key)
                removed += 1
        return removed

    def _now(self) -> float:
        """Unix seconds, by the clock of the place."""
        key = f"{PROBES}{uuid4().hex}"
        self._objects.create(key, b"")
        try:
            return next(found.modified for found in self._objects.list(key))
        finally:
            self._objects.remove(key)


def _problem(digest: str, upload: Upload, sizes: Mapping[str, int]) -> str | None:
    found = [sizes.get(blob_key(digest, upload.id, file)) for file in FILES]
    if any(size is None for size in found):
        return "its files are missing"
    total = sum(size or 0 for size in found)
    return None if total == upload.size_bytes else f"its files have {total} bytes, expected {upload.size_bytes}"
