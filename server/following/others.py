"""Owns bringing this server up to what the store says of one name, after another server changed it.

Invariant: a version that the store has is known here, one that it does not have any more ends here as a deleted one
does: nothing new is let in, running requests may finish.
"""

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from adapters.store import AdapterRecord, VersionRecord
from adapters.store.transitions import draining, without


class KnownVersion(Protocol):
    """One version that this server knows (registry/version)."""

    name: str
    record: VersionRecord

    @property
    def number(self) -> int: ...

    @property
    def is_draining(self) -> bool: ...


V = TypeVar("V", bound=KnownVersion)


class KnownNames(Protocol[V]):
    """What this server knows (registry/registry)."""

    def record(self, name: str) -> AdapterRecord | None: ...

    def versions(self, name: str) -> list[V]: ...

    def known(self, name: str, number: int) -> V: ...

    def put_record(self, record: AdapterRecord) -> None: ...


class OthersChanges(Generic[V]):
    """stored: what the store holds of a name. add: makes a version known. end: deletes a version that is draining."""

    def __init__(
        self,
        registry: KnownNames[V],
        stored: Callable[[str], AdapterRecord | None],
        add: Callable[[str, VersionRecord], None],
        end: Callable[[V], None],
    ) -> None:
        self._registry, self._stored, self._add, self._end = registry, stored, add, end

    def without(self, version: V) -> AdapterRecord | None:
        """What is known of a version's name without it; None if nothing is."""
        self.take_over(version.name)
        record, name = self._stored(version.name), version.name
        known, others = self._registry.record(name), [v for v in self._registry.versions(name) if v is not version]
        if record is None and known is not None and others:  # another server removed them, and they end here still
            return without(known, version.number)
        return record

    def take_over(self, name: str) -> bool:
        """Whether the name is still there. The caller holds its lock."""
        before, record = self._registry.record(name), self._stored(name)
        known = {version.number: version for version in self._registry.versions(name)}
        wanted: Mapping[int, VersionRecord] = {} if record is None else {v.version: v for v in record.versions}
        for number, stored in wanted.items():
            if number not in known:
                self._add(name, stored)
        gone = [version for number, version in known.items() if number not in wanted]
        ending = [v for v in gone if not v.is_draining]
        ending += [v for n, v in known.items() if n in wanted and not v.is_draining and wanted[n].state == "draining"]
        for version in gone:
            version.record = version.record.draining()
        if record is not None:
            self._registry.put_record(record)
        elif before is not None:
            self._registry.put_record(draining(before, None, before.allowed_keys))
        for version in ending:
            self._end(version)
        for number, stored in wanted.items():
            if number not in known and stored.state == "draining":
                self._end(self._registry.known(name, number))
        return record is not None
