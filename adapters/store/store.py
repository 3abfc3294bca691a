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
from typing import Final, NamedTuple

from adapters.errors import store_errors
from adapters.format.files import CONFIG_FILE
from adapters.ref import Kind
from adapters.store.blobs import Blobs
from adapters.store.durable import Disk
from adapters.store.layout import Layout, blob_bytes
from adapters.store.lock import FolderLock
from adapters.store.names import Names
from adapters.store.opening import Contents, open_folder
from adapters.store.records import AdapterRecord, BaseRecord, VersionRecord, is_digest
from adapters.store.reserve import Reserve

logger = logging.getLogger(__name__)


class Unchanged(Enum):
    """What `update` takes for a field that stays the same, since None is a value."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
Keys = Sequence[str] | Unchanged | None
"""Labels that may select a name; None for every key."""


class Prepared(NamedTuple):
    """What `prepare` found of an upload. damage: what happened to the blob of the same content, if it is not whole."""

    damage: str | None


class Store:
    """An open store, from `open`. Methods raise KeyError for an unknown name or version, StoreError if the disk fails.

    Reads never block, because records are immutable; a lock serialises the changes, and is held for none of what takes
    long with large files: `prepare`, and the removal of a blob.
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
        self._reserve = disk.reserve = Reserve(layout.reserve)
        written = (path for folder in (layout.names, layout.deleted) for path in folder.iterdir())
        self._reserve.fit(max((path.stat().st_size for path in written), default=0))
        self._reserve.fill()
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
        return self._blobs.bytes_used

    def holds(self, digest: str) -> bool:
        """Whether a content is in the store, whole, for whatever name."""
        return digest in self._blobs.sizes

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

    def prepare(self, folder: Path, digest: str) -> Prepared:
        """Make the checked adapter in `folder`, which came from `stage`, durable. Slow, and beside other changes."""
        assert is_digest(digest), digest
        with store_errors(self._layout.root, "storing an upload"):
            self._blobs.sync(folder)
            return Prepared(self._blobs.damage(folder, digest))

    def add(
        self,
        name: str,
        folder: Path,
        digest: str,
        kind: Kind,
        *,
        activate: bool,
        allowed_keys: Keys = UNCHANGED,
        base: BaseRecord | None = None,
        prepared: Prepared | None = None,
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        """Make the checked adapter in `folder`, which came from `stage`, the next version of `name`.

        allowed_keys: set with the version, so that it is private from its first moment; UNCHANGED: what the name has,
        or had before it was deleted. prepared: from `prepare`, by a caller that discards the folder; without it both
        are done here.

        Returns the record, the version, and whether it is new: a ready version with the same content is reused.
        """
        assert is_digest(digest), digest
        try:
            with store_errors(self._layout.root, f"adding a version of {name!r}"):
                damage = (prepared or self.prepare(folder, digest)).damage
                with self._changing():
                    version = VersionRecord(
                        version=1,
                        digest=digest,
                        kind=kind,
                        config=(folder / CONFIG_FILE).read_bytes().decode("utf-8"),
                        size_bytes=blob_bytes(folder),
                        created=int(time.time()),
                        base=base,
                    )
                    try:
                        self._blobs.place(folder, digest, damage)
                        return self._add(name, version, activate, allowed_keys)
                    finally:
                        self._drop_unused(digest)
        finally:
            if prepared is None:
                self._blobs.discard(folder)

    def _add(
        self, name: str, version: VersionRecord, activate: bool, allowed_keys: Keys
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        """Record a version whose blob is there. Its number is given here."""
        record, deleted = self.get(name), self._names.deleted(name)
        changes: dict[str, object] = {}
        if not isinstance(allowed_keys, Unchanged):
            changes["allowed_keys"] = None if allowed_keys is None else tuple(allowed_keys)
        elif deleted is not None:
            changes["allowed_keys"] = deleted.allowed_keys
        if record is not None and record.is_going:
            changes["pinned"] = False
        existing = record.with_digest(version.digest) if record is not None else None
        if record is not None and existing is not None:
            changes["active"] = existing.version if activate else record.active
            return self._names.commit(record.changed(**changes)), existing, False
        number = self._names.next_number(name, deleted)
        version = version.model_copy(update={"version": number})
        if activate:
            changes["active"] = number
        if record is None:
            record = AdapterRecord(name=name, active=None, highest=number, versions=(version,))
        else:
            changes |= {"highest": number, "versions": (*record.versions, version)}
        return self._names.commit(record.changed(**changes)), version, True

    def update(
        self,
        name: str,
        *,
        active: int | Unchanged | None = UNCHANGED,
        allowed_keys: Keys = UNCHANGED,
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

    def adopt(self, name: str, numbers: Sequence[int], base: BaseRecord) -> AdapterRecord:
        """Record the base of versions that have none: those of a store of schema 1."""
        with self._change(f"recording the base of {name!r}"):
            record = self._names.records[name]
            versions = tuple(
                v.model_copy(update={"base": base}) if v.version in numbers and v.base is None else v
                for v in record.versions
            )
            return self._names.commit(record.changed(versions=versions))

    def start_delete(self, name: str, version: int | None, allowed_keys: Keys = UNCHANGED) -> AdapterRecord:
        """Mark a version as draining, or all versions (None), after which the name is removed with the last of them.

        The name survives if a version is added meanwhile, but is not pinned any more if all its versions were draining.
        allowed_keys: set with it.
        """
        with self._change(f"deleting versions of {name!r}"):
            record = self._names.records[name]
            chosen = record.versions if version is None else (record.version(version),)
            numbers = {v.version for v in chosen}
            versions = tuple(v.draining() if v.version in numbers else v for v in record.versions)
            active = None if record.active in numbers else record.active
            keys = record.allowed_keys if isinstance(allowed_keys, Unchanged) else allowed_keys
            return self._names.commit(
                record.changed(active=active, versions=versions, allowed_keys=None if keys is None else tuple(keys))
            )

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
        """Hold the lock for one change, in a store that is open and usable. Afterwards trash/ is emptied."""
        try:
            with self._writing:
                assert self._lock.held, "the store is closed"
                self._names.check_usable()
                yield
        finally:
            self._blobs.purge()

    @contextmanager
    def _change(self, doing: str) -> Iterator[None]:
        """A change that writes little and may free much: it may use the reserve."""
        with self._changing(), store_errors(self._layout.root, doing), self._reserve.lent():
            yield


def _check_can_be_active(record: AdapterRecord, version: int | None) -> None:
    if version is not None and record.version(version).state == "draining":
        raise ValueError(f"{record.name}@{version} is being deleted, expected a ready version: activate another")
