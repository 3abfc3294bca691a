"""Owns what a log says up to a position: records, what stays of deleted names, and where contents are.

Invariant: the same position means the same state, on every machine. Reads need no lock: values are replaced, never
changed.
"""

from collections import Counter
from dataclasses import dataclass, field

from adapters.store.log.entries import Deleted, Entry, Snapshot, Upload
from adapters.store.records import AdapterRecord, Tombstone


class GapError(ValueError):
    """An entry that does not follow the state's position."""


@dataclass
class State:
    """position: the number of the last entry. uploads: by digest, of every content that a version has."""

    position: int = 0
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    deleted: dict[str, Tombstone] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    bytes_used: int = 0
    _users: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, snapshot: Snapshot) -> "State":
        state = cls(snapshot.number)
        state.records = {record.name: record for record in snapshot.records}
        state.deleted = {name: deleted.tombstone() for name, deleted in snapshot.deleted.items()}
        state.uploads = dict(snapshot.uploads)
        state.bytes_used = sum(upload.size_bytes for upload in state.uploads.values())
        state._users = Counter(v.digest for record in snapshot.records for v in record.versions)
        return state

    def snapshot(self) -> Snapshot:
        return Snapshot(
            number=self.position,
            records=[self.records[name] for name in sorted(self.records)],
            deleted={name: Deleted.of(self.deleted[name]) for name in sorted(self.deleted)},
            uploads={digest: self.uploads[digest] for digest in sorted(self.uploads)},
        )

    def apply(self, entry: Entry) -> list[tuple[str, Upload]]:
        """Take over the next entry. Returns the contents whose files nobody needs any more. Raises GapError."""
        if entry.number != self.position + 1:
            raise GapError(f"found entry {entry.number} after {self.position}")
        before = self.records.get(entry.name)
        replaced = [(digest, self.uploads[digest]) for digest in entry.uploads if digest in self.uploads]
        for digest, upload in entry.uploads.items():
            self._set_upload(digest, upload)
        if entry.record is not None:
            self.records[entry.name] = entry.record
            self.deleted.pop(entry.name, None)
        else:
            self.records.pop(entry.name, None)
            if entry.deleted is not None:
                self.deleted[entry.name] = entry.deleted.tombstone()
        dropped = self._count(before, entry.record)
        self.position = entry.number
        return replaced + dropped

    def _count(self, before: AdapterRecord | None, after: AdapterRecord | None) -> list[tuple[str, Upload]]:
        """Keep the users of each digest in step. Returns the uploads that have none any more."""
        old = [version.digest for version in before.versions] if before is not None else []
        new = [version.digest for version in after.versions] if after is not None else []
        self._users.update(new)
        self._users.subtract(old)
        dropped = []
        for digest in dict.fromkeys(old):
            if not self._users[digest]:
                del self._users[digest]
                upload = self._set_upload(digest, None)
                dropped += [] if upload is None else [(digest, upload)]
        return dropped

    def _set_upload(self, digest: str, upload: Upload | None) -> Upload | None:
        before = self.uploads.pop(digest, None)
        self.bytes_used += (0 if upload is None else upload.size_bytes) - (0 if before is None else before.size_bytes)
        if upload is not None:
            self.uploads[digest] = upload
        return before
