"""Owns how versions of the store become known to this server: checked against the served base, and given engine ids.

Invariant: every version of the store is known, one that this server cannot serve with the reason; no engine id is
given twice.
"""

import logging
from collections.abc import Callable
from itertools import count
from typing import Protocol

from adapters.errors import InvalidAdapterError, StoreError
from adapters.ref import AdapterRef
from adapters.store import AdapterRecord, Store, VersionRecord
from server.registry.version import Version
from server.registry.write_queue import WriteQueue
from server.residency.scheduler import ResidencyScheduler
from server.uploads.validate import UploadValidator, ValidatedAdapter

logger = logging.getLogger(__name__)


class KnownVersions(Protocol):
    """Where versions become known (registry/registry)."""

    def put_record(self, record: AdapterRecord) -> None: ...

    def put_version(self, version: Version) -> None: ...

    def with_digest(self, digest: str) -> list[Version]: ...

    def known(self, name: str, number: int) -> Version: ...


class StoredVersions:
    """on_added: called with every version that can be served."""

    def __init__(
        self,
        registry: KnownVersions,
        store: Store,
        scheduler: ResidencyScheduler,
        validator: UploadValidator,
        on_added: Callable[[Version], None],
    ) -> None:
        self._registry, self._store, self._scheduler = registry, store, scheduler
        self._validator, self._on_added = validator, on_added
        self._engine_ids = count(1)
        self._damaged: set[str] = set()
        """Digests of versions that cannot be served because their files were damaged."""

    async def bring_in(self, queue: WriteQueue) -> list[AdapterRecord]:
        """Make all that the store holds known; returns its records."""
        records = self._store.adapters()
        for record in records:
            for stored in record.versions:
                self.add(record.name, stored)
            self._registry.put_record(record)
        await self._adopt_base(records, queue)
        return records

    def add(self, name: str, stored: VersionRecord, accepted: ValidatedAdapter | None = None) -> None:
        """Make a version of the store known. accepted: as the upload was validated, if it just was."""
        folder = self._store.folder(stored.digest)
        failure = self._store.problem(stored.digest)
        if accepted is None and failure is not None:
            self._damaged.add(stored.digest)
        if accepted is None and failure is None:
            try:
                with self._store.used(stored.digest):
                    accepted = self._validator.stored(stored, folder if folder.is_dir() else None)
            except (InvalidAdapterError, ValueError) as error:
                failure = "; ".join(getattr(error, "violations", (str(error),)))
        ref = AdapterRef(f"{name}@{stored.version}", next(self._engine_ids), stored.kind, stored.digest, folder)
        version = Version(name, stored, ref, accepted, failure)
        self._registry.put_version(version)
        if accepted is not None:
            self._scheduler.add(ref, accepted.need)
            self._on_added(version)

    def mend(self, digest: str) -> list[str]:
        """A content was uploaded again: versions whose files were damaged have them back. Returns their names."""
        self._damaged.discard(digest)
        failed = [v for v in self._registry.with_digest(digest) if v.accepted is None and not v.is_draining]
        for version in failed:
            self.add(version.name, version.record)
        return [version.name for version in failed]

    def mend_all(self) -> list[str]:
        """The same for every content that was uploaded again, here or on another server."""
        whole = [digest for digest in self._damaged if self._store.problem(digest) is None]
        return [name for digest in whole for name in self.mend(digest)]

    async def _adopt_base(self, records: list[AdapterRecord], queue: WriteQueue) -> None:
        """Record the served base for versions of a store of schema 1 that fit it: it knew nothing of bases."""
        base, adopted = self._validator.base_record, 0
        for record in records:
            known = (self._registry.known(record.name, v.version) for v in record.versions if v.base is None)
            numbers = [v.number for v in known if v.accepted is not None and self._validator.is_of_base(v.accepted)]
            if not numbers:
                continue
            try:
                self._registry.put_record(await queue.in_thread(self._store.adopt, record.name, numbers, base))
                adopted += len(numbers)
            except StoreError as error:
                logger.error("the base of %s could not be recorded: %s", record.name, error)
        if adopted:
            logger.warning("%d stored versions had no base recorded; recorded the one served now: %s", adopted, base)
