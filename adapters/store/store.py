"""Owns the adapters on disk: names, their versions, which is active, and the files of each by digest.

Invariant: a change that returned is durable, one that raised did not happen; a crash leaves one or the other.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Final

from adapters.errors import store_errors
from adapters.format.files import CONFIG_FILE
from adapters.ref import Kind
from adapters.store.blobs import Blobs
from adapters.store.durable import Disk
from adapters.store.layout import Layout, blob_bytes
from adapters.store.lock import FolderLock
from adapters.store.names import Names
from adapters.store.opening import Contents, open_folder
from adapters.store.records import AdapterRecord, VersionRecord, is_digest

logger = logging.getLogger(__name__)


class Unchanged(Enum):
    """What `update` takes for a field that stays the same, since None is a value."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED


class Store:
    """An open store, from `open`. Methods raise KeyError for an unknown name or version, StoreError if the disk fails.

    Reads never block, because records are immutable; a lock serialises the changes.
    A version whose blob is not whole stays listed, so that it can be deleted: `problem` says what is wrong with it,
    and adding the same content again, under any name, repairs it.
    """

    @classmethod
    def open(cls, folder: Path, disk: Disk | None = None) -> "Store":
        """Open the store at `folder`, creating it if there is none; leftovers of a crash are removed."""
        layout, used = Layout(folder.absolute()), disk or Disk()
        with store_errors(layout.root, "opening"):
            lock, contents = open_folder(layout, used)
        return cls(layout, used, lock, contents)

    def __init__(self, layout: Layout, disk: Disk, lock: FolderLock, contents: Contents) -> None:
        self.secret = contents.secret
        self._layout, self._lock = layout, lock
        self._names = Names(layout, disk, contents.floor, contents.records)
        self._blobs = Blobs(layout, disk, contents.blobs, contents.problems)
        self._writing = threading.RLock()
        for problem in self.problems:
            logger.error("store: %s", problem)

    def close(self) -> None:
        """Release the folder to other processes, once a change under way has returned."""
        with self._writing:
            self._lock.release()

    def adapters(self) -> list[AdapterRecord]:
        """All records, by name."""
        return sorted(self._names.records.values(), key=lambda record: record.name)

    def get(self, name: str) -> AdapterRecord | None:
        return self._names.records.get(name)

    def folder(self, digest: str) -> Path:
        """Where the two files of a content are."""
        assert is_digest(digest), digest
        return self._layout.blob(digest)

    def bytes_used(self) -> int:
        """The size of all blobs; a content that several versions share counts once."""
        return sum(self._blobs.sizes.values())

    def problem(self, digest: str) -> str | None:
        """Why the blob of a version cannot be used; None if it is whole."""
        return self._blobs.problems.get(digest)

    @property
    def problems(self) -> list[str]:
        """One sentence for every version whose blob cannot be used."""
        return [
            f"{record.name}@{version.version}: blobs/{version.digest}: {problem}; restore it from a copy, upload the "
            "same adapter again, or delete the version"
            for record in self.adapters()
            for version in record.versions
            if (problem := self.problem(version.digest)) is not None
        ]

    def stage(self) -> Path:
        """A new empty folder inside the store, for `add` or `discard`."""
        with store_errors(self._layout.root, "staging an upload"):
            return self._blobs.stage()

    def discard(self, staged: Path) -> None:
        """Remove a folder from `stage`, if it still exists."""
        self._blobs.discard(staged)

    def add(
        self, name: str, folder: Path, digest: str, kind: Kind, *, activate: bool
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        """Make the checked adapter in `folder`, which came from `stage` and is consumed, the next version of `name`.

        Returns the record, the version, and whether it is new: a ready version with the same content is reused.
        """
        assert is_digest(digest), digest
        try:
            with store_errors(self._layout.root, f"adding a version of {name!r}"):
                self._blobs.sync(folder)
                damage = self._blobs.damage(folder, digest)
                with self._changing():
                    return self._add(name, folder, digest, kind, activate, damage)
        finally:
            self._blobs.discard(folder)

    def _add(
        self, name: str, folder: Path, digest: str, kind: Kind, activate: bool, damage: str | None
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        version = VersionRecord(
            version=self._names.next_number(name),
            digest=digest,
            kind=kind,
            config=(folder / CONFIG_FILE).read_bytes().decode("utf-8"),
            size_bytes=blob_bytes(folder),
            created=int(time.time()),
        )
        try:
            self._blobs.place(folder, digest, damage)
            record = self.get(name)
            if record is not None and record.is_going:
                record = record.changed(allowed_keys=None, pinned=False)
            existing = record.with_digest(digest) if record is not None else None
            if record is not None and existing is not None:
                active = existing.version if activate else record.active
                return self._names.commit(record.changed(active=active)), existing, False
            number = version.version
            if record is None:
                record = AdapterRecord(name=name, active=None, highest=number, versions=(version,))
            else:
                record = record.changed(highest=number, versions=(*record.versions, version))
            return self._names.commit(record.changed(active=number) if activate else record), version, True
        finally:
            self._drop_unused(digest)

    def update(
        self,
        name: str,
        *,
        active: int | Unchanged | None = UNCHANGED,
        allowed_keys: Sequence[str] | Unchanged | None = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
    ) -> AdapterRecord:
        """Change the given fields, all or none. Raises ValueError if `active` names a version that is being deleted."""
        with self._change(f"changing {name!r}"):
            record = self._names.records[name]
            changes: dict[str, object] = {}
            if not isinstance(active, Unchanged):
                _check_can_be_active(record, active)
                changes["active"] = active
            if not isinstance(allowed_keys, Unchanged):
                changes["allowed_keys"] = None if allowed_keys is None else tuple(allowed_keys)
            if not isinstance(pinned, Unchanged):
                changes["pinned"] = pinned
            return self._names.commit(record.changed(**changes))

    def start_delete(self, name: str, version: int | None) -> AdapterRecord:
        """Mark a version as draining, or all versions (None), after which the name is removed with the last of them.

        The name survives if a version is added meanwhile, but keeps no settings if all its versions were draining.
        """
        with self._change(f"deleting versions of {name!r}"):
            record = self._names.records[name]
            chosen = record.versions if version is None else (record.version(version),)
            numbers = {v.version for v in chosen}
            versions = tuple(v.draining() if v.version in numbers else v for v in record.versions)
            active = None if record.active in numbers else record.active
            return self._names.commit(record.changed(active=active, versions=versions))

    def finish_delete(self, name: str, version: int) -> AdapterRecord | None:
        """Remove a draining version, and its blob if no other needs it. Returns None if the name is gone too."""
        with self._change(f"deleting {name}@{version}"):
            record = self._names.records[name]
            removed = record.version(version)
            if removed.state != "draining":
                raise ValueError(f"{name}@{version} is {removed.state}, expected draining: call start_delete first")
            rest = tuple(v for v in record.versions if v is not removed)
            if rest:
                self._names.commit(record.changed(versions=rest))
            else:
                self._names.forget(name)
            self._drop_unused(removed.digest)
            return self.get(name)

    def _drop_unused(self, digest: str) -> None:
        if self._names.failure is None and not self._names.uses(digest):
            self._blobs.drop(digest)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock for one change, in a store that is open and usable."""
        with self._writing:
            assert self._lock.held, "the store is closed"
            self._names.check_usable()
            yield

    @contextmanager
    def _change(self, doing: str) -> Iterator[None]:
        with self._changing(), store_errors(self._layout.root, doing):
            yield


def _check_can_be_active(record: AdapterRecord, version: int | None) -> None:
    if version is not None and record.version(version).state == "draining":
        raise ValueError(f"{record.name}@{version} is being deleted, expected a ready version: activate another")
