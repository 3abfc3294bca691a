"""Owns the records of an open store: in memory, and on disk in one file each.

Invariant: memory holds what the disk durably holds; once a failed change cannot be rolled back, the store refuses all
further ones. No change costs more with more names or versions.
"""

import logging
from collections import Counter

from adapters.errors import StoreUnusableError
from adapters.store.folder.deleted import DeletedNames
from adapters.store.folder.durable import Disk
from adapters.store.folder.layout import Layout
from adapters.store.records import AdapterRecord, Tombstone, read_record

logger = logging.getLogger(__name__)


class Names:
    """records: by name; a reader of all of them takes `list(records.values())`, which is one step.

    floor: a new name starts above it. failure: why a failed change could not be rolled back; None if all is well.
    """

    def __init__(self, layout: Layout, disk: Disk, floor: int, records: dict[str, AdapterRecord]) -> None:
        self.records = records
        self.failure: str | None = None
        self.floor, self._layout, self._disk = floor, layout, disk
        self._deleted = DeletedNames(layout, disk)
        self._users = Counter(version.digest for record in records.values() for version in record.versions)

    def check_usable(self) -> None:
        if self.failure is not None:
            raise StoreUnusableError(f"{self.failure}; look at the disk, then start the server again")

    def deleted(self, name: str) -> Tombstone | None:
        """What is remembered of a name that was deleted; None for one that exists, or never did."""
        return None if name in self.records else self._deleted.get(name)

    def uses(self, digest: str) -> bool:
        return self._users[digest] > 0

    def commit(self, record: AdapterRecord) -> AdapterRecord:
        """Store `record` under its name, on disk and then in memory; after an error in neither."""
        before = self.records.get(record.name)
        if record != before:
            try:
                self._disk.write(self._layout.record(record.name), record.file_bytes())
            except OSError:
                self._roll_back(record.name)
                raise
            self.records[record.name] = record
            self._count(before, record)
        return record

    def forget(self, name: str) -> None:
        """Remove the record of a name. Its numbers stay used, and its restriction is remembered."""
        record = self.records[name]
        self._deleted.put(name, Tombstone(record.highest, record.allowed_keys))
        try:
            self._disk.remove_file(self._layout.record(name))
            self._disk.sync_folder(self._layout.names)
        except OSError:
            self._roll_back(name)
            raise
        del self.records[name]
        self._count(record, None)

    def _count(self, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        """Keep the users of each digest in step with a record's change."""
        for version in before.versions if before is not None else ():
            self._users[version.digest] -= 1
        for version in after.versions if after is not None else ():
            self._users[version.digest] += 1
        for version in before.versions if before is not None else ():
            if not self._users[version.digest]:
                del self._users[version.digest]

    def _roll_back(self, name: str) -> None:
        """Roll a change back that failed half-way: restore on disk what memory holds."""
        path, record = self._layout.record(name), self.records.get(name)
        try:
            if record is None:
                if path.exists():
                    self._disk.remove_file(path)
                    self._disk.sync_folder(path.parent)
            elif not path.exists() or read_record(path) != record:
                self._disk.write(path, record.file_bytes())
        except (OSError, ValueError) as error:
            self.failure = f"a change of {name!r} could neither be finished nor rolled back: {error}"
            logger.error("store: %s", self.failure)
