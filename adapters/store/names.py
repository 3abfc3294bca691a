"""Owns the records of an open store: in memory, and on disk in one file each.

Invariant: memory holds what the disk durably holds; once a failed change cannot be rolled back, the store refuses all
further ones.
"""

import logging

from adapters.errors import StoreUnusableError
from adapters.store.durable import Disk
from adapters.store.layout import Layout
from adapters.store.opening import SCHEMA
from adapters.store.records import AdapterRecord, StoreFile, read_record

logger = logging.getLogger(__name__)


class Names:
    """records: by name; the dict is replaced, never changed, so readers need no lock.

    failure: why a failed change could not be rolled back; None if all is well.
    """

    def __init__(self, layout: Layout, disk: Disk, floor: int, records: dict[str, AdapterRecord]) -> None:
        self.records = records
        self.failure: str | None = None
        self._layout, self._disk, self._floor = layout, disk, floor

    def check_usable(self) -> None:
        if self.failure is not None:
            raise StoreUnusableError(f"{self.failure}; look at the disk, then start the server again")

    def next_number(self, name: str) -> int:
        """The next version number: above every number the name ever had, even before it was deleted."""
        record = self.records.get(name)
        return (self._floor if record is None else record.highest) + 1

    def uses(self, digest: str) -> bool:
        return any(version.digest == digest for record in self.records.values() for version in record.versions)

    def commit(self, record: AdapterRecord) -> AdapterRecord:
        """Store `record` under its name, on disk and then in memory; after an error in neither."""
        if record != self.records.get(record.name):
            try:
                self._disk.write(self._layout.record(record.name), record.file_bytes())
            except OSError:
                self._roll_back(record.name)
                raise
            self.records = {**self.records, record.name: record}
        return record

    def forget(self, name: str) -> None:
        """Remove the record of a name. Its version numbers stay used: the floor of new names is raised first."""
        self._raise_floor(self.records[name].highest)
        try:
            self._disk.remove_file(self._layout.record(name))
            self._disk.sync_folder(self._layout.names)
        except OSError:
            self._roll_back(name)
            raise
        self.records = {k: record for k, record in self.records.items() if k != name}

    def _raise_floor(self, highest: int) -> None:
        if highest > self._floor:
            self._disk.write(self._layout.store_file, StoreFile(schema=SCHEMA, floor=highest).file_bytes())
            self._floor = highest

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
