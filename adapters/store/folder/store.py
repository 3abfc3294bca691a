"""Owns the adapters on disk: names, their versions, which is active, and the files of each by digest.

Invariant: a change that returned is durable, one that raised did not happen; a crash leaves one or the other.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from adapters.errors import store_errors
from adapters.format.files import CONFIG_FILE
from adapters.ref import Kind
from adapters.store import transitions
from adapters.store.folder.blobs import Blobs
from adapters.store.folder.durable import Disk
from adapters.store.folder.layout import Layout, blob_bytes
from adapters.store.folder.lock import FolderLock
from adapters.store.folder.names import Names
from adapters.store.folder.opening import Contents, open_folder
from adapters.store.folder.reserve import Reserve
from adapters.store.protocol import Check, Prepared, Room
from adapters.store.records import AdapterRecord, BaseRecord, VersionRecord, is_digest
from adapters.store.transitions import UNCHANGED, Keys, Unchanged

logger = logging.getLogger(__name__)


class FolderStore:
    """An open store, from `open` (see adapters/store/protocol).

    A lock serialises the changes, and is held for none of what takes long with large files: `prepare`, and the removal
    of a blob. Adding the same content again, under any name, repairs one that is not whole.
    """

    @classmethod
    def open(cls, folder: Path, disk: Disk | None = None) -> "FolderStore":
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
        with self._writing:
            self._lock.release()

    def adapters(self) -> list[AdapterRecord]:
        return sorted(self._names.records.values(), key=lambda record: record.name)

    def get(self, name: str) -> AdapterRecord | None:
        return self._names.records.get(name)

    def folder(self, digest: str) -> Path:
        assert is_digest(digest), digest
        return self._layout.blob(digest)

    def fetch(self, digest: str) -> Path:
        return self.folder(digest)

    def used(self, digest: str) -> AbstractContextManager[None]:
        return nullcontext()

    def renew(self, digest: str) -> bool:
        return False

    def free_bytes(self) -> int:
        disk = os.statvfs(self._layout.root)
        return disk.f_bavail * disk.f_frsize

    def bytes_used(self) -> int:
        return self._blobs.bytes_used

    def holds(self, digest: str) -> bool:
        return digest in self._blobs.sizes

    def problem(self, digest: str) -> str | None:
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
        with store_errors(self._layout.root, "staging an upload"):
            return self._blobs.stage()

    def discard(self, staged: Path) -> None:
        self._blobs.discard(staged)

    def prepare(self, folder: Path, digest: str) -> Prepared:
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
        check: Check | None = None,
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        assert is_digest(digest), digest
        try:
            with store_errors(self._layout.root, f"adding a version of {name!r}"):
                damage = (prepared or self.prepare(folder, digest)).damage
                with self._changing():
                    if check is not None:
                        check(self._room(name, 0 if self.holds(digest) else blob_bytes(folder)))
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
        """Record a version whose blob is there."""
        tombstone = self._names.deleted(name)
        made = transitions.added(
            name, self.get(name), tombstone, self._names.floor, version, activate=activate, allowed_keys=allowed_keys
        )
        return self._names.commit(made.record), made.version, made.is_new

    def update(
        self,
        name: str,
        *,
        active: int | Unchanged | None = UNCHANGED,
        allowed_keys: Keys = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
        check: Check | None = None,
    ) -> AdapterRecord:
        with self._change(f"changing {name!r}"):
            if check is not None:
                check(self._room(name))
            record = self._names.records[name]
            return self._names.commit(
                transitions.updated(record, active=active, allowed_keys=allowed_keys, pinned=pinned)
            )

    def adopt(self, name: str, numbers: Sequence[int], base: BaseRecord) -> AdapterRecord:
        with self._change(f"recording the base of {name!r}"):
            return self._names.commit(transitions.with_base(self._names.records[name], numbers, base))

    def start_delete(
        self, name: str, version: int | None, allowed_keys: Keys = UNCHANGED, *, check: Check | None = None
    ) -> AdapterRecord:
        with self._change(f"deleting versions of {name!r}"):
            if check is not None:
                check(self._room(name))
            return self._names.commit(transitions.draining(self._names.records[name], version, allowed_keys))

    def finish_delete(self, name: str, version: int) -> AdapterRecord | None:
        with self._change(f"deleting {name}@{version}"):
            record = self._names.records[name]
            rest = transitions.without(record, version)
            if rest is not None:
                self._names.commit(rest)
            else:
                self._names.forget(name)
            self._drop_unused(record.version(version).digest)
            return rest

    def _room(self, name: str, bytes_more: int = 0) -> Room:
        return Room(self.get(name), len(self._names.records), self.bytes_used(), bytes_more)

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
