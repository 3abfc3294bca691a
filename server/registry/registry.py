"""Owns what the server knows of names and versions: who may see them, what a request's `model` selects, how they look.

Invariant: what a caller may not use is, for this caller, not there. It is changed by `server.registry.service` alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from adapters import AdapterRecord, Store
from adapters.format.folder import WEIGHTS_FILE
from server.api.schemas import AdapterObject, VersionObject
from server.auth.keys import Caller
from server.errors import ApiError, ModelNotFound
from server.registry.version import Version
from server.residency.scheduler import ResidencyScheduler


class Registry:
    """Names and versions in memory, as the store holds them."""

    def __init__(self, store: Store, plan: ResidencyScheduler, base_names: list[str]) -> None:
        self.base_names, self.plan = base_names, plan
        self._store = store
        self._versions: dict[str, dict[int, Version]] = {}
        self._records: dict[str, AdapterRecord] = {}
        self._by_id: dict[str, Version] = {}

    def names(self) -> list[str]:
        return sorted(self._records)

    def has(self, name: str) -> bool:
        return name in self._records

    def versions(self, name: str) -> list[Version]:
        return list(self._versions.get(name, {}).values())

    def active(self, name: str) -> Version | None:
        """The active version of a name that exists."""
        number = self._records[name].active
        return None if number is None else self._versions[name][number]

    def by_id(self, version_id: str) -> Version | None:
        """NAME@version -> the version."""
        return self._by_id.get(version_id)

    def store_bytes(self) -> int:
        return self._store.bytes_used()

    def look(self) -> list[tuple[AdapterRecord, list[Version]]]:
        """Every name as it is now, with those of its versions that are there. From any thread: the event loop may take
        names and versions out meanwhile."""
        return [(record, self.versions(name)) for name, record in dict(self._records).items()]

    def adapters(self, caller: Caller, after: str = "", limit: int | None = None) -> list[AdapterObject]:
        """What `caller` may see, by name: the first `limit` after `after`. Only these are built."""
        seen = sorted(name for name in self._records if name > after and self._may_use(name, caller))
        return [self._object(name) for name in seen[:limit]]

    def adapter(self, name: str, caller: Caller) -> AdapterObject:
        """Raises ApiError adapter_not_found."""
        self._check_visible(name, caller)
        return self._object(name)

    def version(self, name: str, version: int, caller: Caller) -> VersionObject:
        """Raises ApiError adapter_not_found or version_not_found."""
        return self._version_object(self._find(name, version, caller))

    def file(self, name: str, version: int, which: Literal["config", "weights"], caller: Caller) -> Path | bytes:
        """The bytes of one of a version's two files, or where they are."""
        found = self._find(name, version, caller)
        if which == "config":
            return found.record.config.encode()
        return self._store.folder(found.record.digest) / WEIGHTS_FILE

    def servable(self, caller: Caller) -> list[tuple[str, int]]:
        """Every name that can be asked, and when its active version was made."""
        return [
            (name, version.record.created)
            for name in self.names()
            if self._may_use(name, caller)
            and (version := self.active(name)) is not None
            and version.accepted is not None
        ]

    def resolve(self, model: str, caller: Caller) -> Version | None:
        """What `model` selects: NAME's active version, NAME@version, or None for the base. Raises ModelNotFound."""
        if model in self.base_names:
            return None
        name, at, _ = model.partition("@")
        if name not in self._records or not self._may_use(name, caller):
            raise ModelNotFound(model)
        version = self._by_id.get(model) if at else self.active(name)
        if version is None or version.record.state == "draining":
            raise ModelNotFound(model)
        return version

    @contextmanager
    def lease(self, version: Version) -> Iterator[None]:
        """Keep a version alive. Raises ApiError adapter_unavailable if this server cannot serve it."""
        if version.accepted is None:
            raise self._unservable(version, "model")
        version.lease()
        try:
            yield
        finally:
            version.release()

    # For the catalog

    def _enter(self, version: Version) -> None:
        """One more version, or another in the place of one that could not be served."""
        self._versions.setdefault(version.name, {})[version.number] = version
        self._by_id[version.id] = version

    def _take_over(self, record: AdapterRecord) -> None:
        """What the store holds of a name now; its versions are known."""
        self._records[record.name] = record
        for stored in record.versions:
            self._versions[record.name][stored.version].record = stored

    def _take_out(self, version: Version, record: AdapterRecord | None) -> None:
        """A version is gone. record: what the store holds of its name now, None if that went with it."""
        del self._by_id[version.id], self._versions[version.name][version.number]
        if record is not None:
            self._take_over(record)
        else:
            del self._records[version.name], self._versions[version.name]

    def _may_use(self, name: str, caller: Caller) -> bool:
        allowed = self._records[name].allowed_keys
        return caller.is_admin or allowed is None or caller.label in allowed

    def _check_visible(self, name: str, caller: Caller) -> None:
        if name not in self._records or not self._may_use(name, caller):
            message = f"found no adapter {name[:100]!r}; GET /v1/adapters lists them"
            raise ApiError(404, "adapter_not_found", message, "name")

    def _find(self, name: str, version: int, caller: Caller) -> Version:
        self._check_visible(name, caller)
        found = self._versions[name].get(version)
        if found is None:
            raise ApiError(404, "version_not_found", f"found no version {version} of {name!r}", "version")
        return found

    @staticmethod
    def _unservable(version: Version, param: str) -> ApiError:
        message = f"{version.id} cannot be served: {version.failure}"
        return ApiError(503, "adapter_unavailable", message, param, retry_after=60)

    def _object(self, name: str) -> AdapterObject:
        record = self._records[name]
        return AdapterObject(
            name=name,
            active=record.active,
            allowed_keys=None if record.allowed_keys is None else list(record.allowed_keys),
            pinned=record.pinned,
            versions=[self._version_object(self._versions[name][v.version]) for v in record.versions],
        )

    def _version_object(self, version: Version) -> VersionObject:
        return version.as_object(self.plan.tier(version.engine), self.plan.failure(version.engine))
