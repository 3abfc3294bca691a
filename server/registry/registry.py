"""Owns what the server knows of names and versions: what a request's `model` selects, who may use what.

Invariant: what a caller may not use does not exist for this caller. Only `registry/service` changes it.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from adapters.format.files import WEIGHTS_FILE
from adapters.names import NAME_RULE, is_name, suggested_name
from adapters.ref import AdapterRef
from adapters.store import AdapterRecord, Store
from server.auth.keys import Caller
from server.errors import (
    AdapterNotFoundError,
    InvalidNameError,
    ModelNotFoundError,
    NameConflictError,
    VersionNotFoundError,
)
from server.registry.version import AdapterView, Version, VersionView, unservable
from server.residency.state import Loaded, Tier


class Residency(Protocol):
    """Where versions are, and why the last load of one failed (residency/scheduler)."""

    def tier(self, adapter: AdapterRef) -> Tier: ...

    def failure(self, adapter: AdapterRef) -> str | None: ...

    @property
    def loaded(self) -> Loaded: ...


class Registry:
    """Names and versions in memory, as the store holds them. base_names: the names of the base model.

    changes: how often anything of them has changed.
    """

    def __init__(self, store: Store, residency: Residency, base_names: list[str]) -> None:
        self.base_names = base_names
        self._store, self._residency = store, residency
        self._versions: dict[str, dict[int, Version]] = {}
        self._records: dict[str, AdapterRecord] = {}
        self._names: list[str] = []
        self._active: dict[str, Version | None] = {}
        self._by_id: dict[str, Version] = {}
        self._by_digest: dict[str, dict[str, Version]] = {}
        self.changes = 0

    # What a request selects

    def resolve(self, model: str, caller: Caller) -> Version | None:
        """What `model` selects: NAME's active version, NAME@version, or None for the base.

        Raises ModelNotFoundError.
        """
        if model in self.base_names:
            return None
        name, at, _ = model.partition("@")
        if name not in self._records or not self._may_use(name, caller):
            raise ModelNotFoundError(model)
        version = self._by_id.get(model) if at else self.active(name)
        if version is None or version.is_draining:
            raise ModelNotFoundError(model)
        return version

    @contextmanager
    def lease(self, version: Version) -> Iterator[None]:
        """Keep a version alive. Raises AdapterUnavailableError if this server cannot serve it."""
        if version.accepted is None:
            raise unservable(version)
        version.lease()
        try:
            yield
        finally:
            version.release()

    # What a caller may see

    def visible_names(self, caller: Caller) -> list[str]:
        """The names that the caller may use, sorted."""
        if caller.is_admin:
            return self.names()
        records, label = self._records, caller.label
        return [name for name in self._names if (keys := records[name].allowed_keys) is None or label in keys]

    def adapter(self, name: str, caller: Caller) -> AdapterView:
        """Raises AdapterNotFoundError."""
        self.visible(name, caller)
        return self.view(name, caller)

    def version(self, name: str, number: int, caller: Caller) -> Version:
        """Raises AdapterNotFoundError or VersionNotFoundError."""
        self.visible(name, caller)
        found = self._versions[name].get(number)
        if found is None:
            raise VersionNotFoundError(name, number)
        return found

    def servable(self, caller: Caller) -> list[tuple[str, int]]:
        """Every name that can be selected, and when its active version was created (unix seconds)."""
        return [
            (name, version.record.created)
            for name in self.names()
            if self._may_use(name, caller)
            and (version := self.active(name)) is not None
            and version.accepted is not None
        ]

    def visible(self, name: str, caller: Caller) -> AdapterRecord:
        """What the store holds of a name that the caller may use. Raises AdapterNotFoundError."""
        if name not in self._records or not self._may_use(name, caller):
            raise AdapterNotFoundError(name)
        return self._records[name]

    def view(self, name: str, caller: Caller, active_only: bool = False) -> AdapterView:
        """The adapter as it is now, without what `caller` may not know of other keys.

        active_only: with its active version alone, or the newest if none is active.
        """
        record = self._records[name]
        if active_only:
            numbers = [record.active or record.versions[-1].version]
        else:
            numbers = [stored.version for stored in record.versions]
        allowed = record.allowed_keys
        return AdapterView(
            name=name,
            active=record.active,
            allowed_keys=None if allowed is None else [k for k in allowed if caller.is_admin or k == caller.label],
            pinned=record.pinned,
            versions=[self.version_view(self._versions[name][number], caller) for number in numbers],
        )

    def version_view(self, version: Version, caller: Caller) -> VersionView:
        """One version as it is now. Whether other keys use it is not shown to one of them."""
        found = version.view(self._residency.tier(version.ref), self._residency.failure(version.ref))
        if self.sees_use(version.name, caller):
            return found
        return replace(found, last_used=None, requests_running=None)

    def version_count(self, name: str) -> int:
        """How many versions an adapter has."""
        return len(self._records[name].versions)

    def sees_use(self, name: str, caller: Caller) -> bool:
        """Whether the caller may know when and how much an adapter is used: it shares it with no other key."""
        return caller.is_admin or caller.label is None or self._records[name].allowed_keys == (caller.label,)

    def loaded(self) -> Mapping[str, Tier]:
        """Where every content is that is on the device or the host, by its key."""
        return self._residency.loaded.tiers()

    # What there is, whoever asks

    def names(self) -> list[str]:
        return list(self._names)

    def count(self) -> int:
        """How many names there are."""
        return len(self._records)

    def has(self, name: str) -> bool:
        return name in self._records

    def record(self, name: str) -> AdapterRecord | None:
        """What the store holds of a name; None for a name that does not exist."""
        return self._records.get(name)

    def versions(self, name: str) -> list[Version]:
        return list(self._versions.get(name, {}).values())

    def all_versions(self) -> list[Version]:
        return list(self._by_id.values())

    def with_digest(self, digest: str) -> list[Version]:
        """The versions of a content, under all names."""
        return list(self._by_digest.get(digest, {}).values())

    def numbered(self, name: str, number: int) -> Version | None:
        return self._versions.get(name, {}).get(number)

    def known(self, name: str, number: int) -> Version:
        """A version that exists."""
        return self._versions[name][number]

    def active(self, name: str) -> Version | None:
        """The active version of a name that exists."""
        return self._active[name]

    def active_of(self, names: Iterable[str]) -> list[Version | None]:
        """The active version of each name."""
        return [self._active[name] for name in names]

    def by_id(self, version_id: str) -> Version | None:
        """The version with the id NAME@version."""
        return self._by_id.get(version_id)

    def snapshot(self) -> list[tuple[AdapterRecord, list[Version]]]:
        """Every name with its versions. Safe from any thread: the event loop may add and remove some meanwhile."""
        return [(record, self.versions(name)) for name, record in dict(self._records).items()]

    def weights_file(self, version: Version) -> Path:
        """The weights file of a version, on this machine (blocks where it must be fetched). Raises StoreError."""
        return self._store.fetch(version.record.digest) / WEIGHTS_FILE

    def reading(self, version: Version) -> AbstractContextManager[None]:
        """Keep the files of a version on this machine meanwhile."""
        return self._store.used(version.record.digest)

    def store_bytes(self) -> int:
        return self._store.bytes_used()

    # What the service changes

    def put_version(self, version: Version) -> None:
        """Add a version, or replace one that could not be served."""
        self.changes += 1
        self._versions.setdefault(version.name, {})[version.number] = version
        self._by_id[version.id] = version
        if (record := self._records.get(version.name)) is not None and record.active == version.number:
            self._active[version.name] = version
        self._by_digest.setdefault(version.record.digest, {})[version.id] = version

    def put_record(self, record: AdapterRecord) -> None:
        """Take over what the store holds of a name; its versions are known."""
        self.changes += 1
        if record.name not in self._records:
            insort(self._names, record.name)
        self._records[record.name] = record
        self._active[record.name] = self._versions[record.name].get(record.active or 0)
        for stored in record.versions:
            self._versions[record.name][stored.version].record = stored

    def remove_version(self, version: Version, record: AdapterRecord | None) -> None:
        """Remove a version. record: what the store still holds of its name; None if the name went with it."""
        self.changes += 1
        del self._by_id[version.id], self._versions[version.name][version.number]
        same = self._by_digest[version.record.digest]
        del same[version.id]
        if not same:
            del self._by_digest[version.record.digest]
        if record is not None:
            self.put_record(record)
        else:
            del self._records[version.name], self._versions[version.name], self._active[version.name]
            self._names.remove(version.name)

    def _may_use(self, name: str, caller: Caller) -> bool:
        allowed = self._records[name].allowed_keys
        return caller.is_admin or allowed is None or caller.label in allowed


def name_problem(name: str, base_names: list[str]) -> str | None:
    """Why `name` cannot be an adapter's name, or None."""
    if name in base_names:
        return f"found the name {name!r}, which is the base model's served name; choose another"
    if not is_name(name):
        shown = ascii(name) if len(name) <= 100 else ascii(name[:97]) + "..."
        suggested = suggested_name(name)
        return f"found the name {shown}, expected {NAME_RULE}" + (f": such as {suggested!r}" if suggested else "")
    return None


def check_name(name: str, base_names: list[str]) -> None:
    """Raises NameConflictError for the base's name, InvalidNameError for what cannot be a name."""
    if problem := name_problem(name, base_names):
        raise NameConflictError(problem) if name in base_names else InvalidNameError(problem)
