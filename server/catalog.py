"""Owns the adapters of a running server: names, versions, which is active, who may use them, and their ends.

On top of the store (what is durable) and the residency plan (what is where). Invariants: a change is in the store
before anybody sees it; a request keeps the version it was given until its last byte; what is being deleted admits
nothing new. Everything runs on one event loop; the disk is touched on one thread beside it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from adapters import (
    UNCHANGED,
    AdapterRecord,
    InvalidAdapterError,
    StorageFullError,
    Store,
    StoreError,
    VersionRecord,
)
from adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from server.background import yield_to_everybody
from server.engine import EngineAdapter
from server.errors import ApiError, ModelNotFound
from server.intake import Accepted, Intake
from server.keys import Caller
from server.names import name_problem
from server.residency import ResidencyPlan
from server.schemas import AdapterObject, AdapterPatch, VersionObject
from server.versions import Version

P = ParamSpec("P")
T = TypeVar("T")
LAST_BYTES_S = 2.0
"""How long ended requests of a deleted version have for the last bytes of their answers."""


class Quotas(Protocol):
    """How much the store takes (the settings)."""

    @property
    def max_adapters(self) -> int: ...
    @property
    def max_versions(self) -> int: ...
    @property
    def max_store_bytes(self) -> int | None: ...
    @property
    def drain_timeout_s(self) -> float: ...


class Watcher(Protocol):
    """Who is told what becomes of versions: vLLM's table of names, the metrics, the audit log."""

    def served(self, version: Version) -> None: ...

    def gone(self, version: Version) -> None: ...

    def name_gone(self, name: str) -> None: ...

    def uploaded(self, result: str) -> None: ...

    def record(self, action: str, caller: Caller, **details: Any) -> None: ...


class Catalog:
    """See the module. Made by `Catalog.open`."""

    def __init__(
        self, store: Store, plan: ResidencyPlan, intake: Intake, base_names: list[str], quotas: Quotas, watcher: Watcher,
        abort: Callable[[str], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.base_names, self.plan = base_names, plan
        self._store, self._intake, self._quotas, self._watcher, self._abort = store, intake, quotas, watcher, abort
        self._versions: dict[str, dict[int, Version]] = {}
        self._records: dict[str, AdapterRecord] = {}
        self._by_id: dict[str, Version] = {}
        self._ids = count(1)
        self._changing = asyncio.Lock()
        self._disk = ThreadPoolExecutor(1, "perft-store")
        self._checks = ThreadPoolExecutor(1, "perft-checks", initializer=yield_to_everybody)
        self._drains: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bring in what the store holds; go on with deletes that were under way; load what is pinned."""
        for record in self._store.adapters():
            self._records[record.name] = record
            for version in record.versions:
                self._bring_in(record.name, version)
        for record in list(self._records.values()):
            for version in record.versions:
                if version.state == "draining":
                    self._drain(self._versions[record.name][version.version])
            if record.pinned and (active := self.active(record.name)) is not None and active.accepted is not None:
                with suppress(ApiError):
                    await self.plan.pin(active.engine)

    async def close(self) -> None:
        """Let the store go. Deletes under way go on at the next start."""
        for task in self._drains:
            task.cancel()
        await asyncio.gather(*self._drains, return_exceptions=True)
        await self._on_disk(self._store.close)
        self._disk.shutdown()
        self._checks.shutdown(wait=False)

    # What there is

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

    def adapters(self, caller: Caller) -> list[AdapterObject]:
        """All that `caller` may see, by name."""
        return [self._object(name) for name in self.names() if self._may_use(name, caller)]

    def adapter(self, name: str, caller: Caller) -> AdapterObject:
        """Raises ApiError adapter_not_found."""
        self._visible(name, caller)
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
        found = [(name, self.active(name)) for name in self.names() if self._may_use(name, caller)]
        return [(name, version.record.created) for name, version in found if version is not None]

    def resolve(self, model: str, caller: Caller) -> Version | None:
        """What `model` selects: NAME's active version, NAME@version, or None for the base. Raises ModelNotFound."""
        if model in self.base_names:
            return None
        name, _, number = model.partition("@")
        if name not in self._records or not self._may_use(name, caller):
            raise ModelNotFound(model)
        version = self._by_id.get(model) if "@" in model else self.active(name)
        if version is None or version.record.state == "draining":
            raise ModelNotFound(model)
        return version

    @contextmanager
    def lease(self, version: Version) -> Iterator[None]:
        """Keep a version alive. Raises ApiError adapter_unavailable if this server cannot serve it."""
        if version.accepted is None:
            message = f"{version.id} cannot be served: {version.failure}"
            raise ApiError(503, "adapter_unavailable", message, "model", retry_after=60)
        version.lease()
        try:
            yield
        finally:
            version.release()

    # What changes it

    def stage(self) -> Path:
        """A new folder for an upload (blocks)."""
        with _store_errors():
            return self._store.stage()

    def discard(self, staged: Path) -> None:
        """Remove it, if it is still there (blocks)."""
        self._store.discard(staged)

    async def upload(self, name: str, folder: Path, activate: bool, caller: Caller) -> tuple[AdapterObject, bool]:
        """A staged folder becomes the next version of `name`; False: that content was one already.

        Raises ApiError with the codes of API.md.
        """
        try:
            created = await _to_its_end(self._upload(name, folder, activate, caller))
        except ApiError as error:
            self._watcher.uploaded(error.code)
            raise
        self._watcher.uploaded("created" if created else "existing")
        return self._object(name), created

    async def patch(self, name: str, change: AdapterPatch, caller: Caller) -> AdapterObject:
        """Change what is given, all or nothing. A version is on the host before it becomes the active one."""
        return await _to_its_end(self._patch(name, change, caller))

    async def delete(self, name: str, version: int | None, caller: Caller) -> AdapterObject:
        """Start a delete: nothing new is admitted, what runs may finish until the deadline."""
        return await _to_its_end(self._delete(name, version, caller))

    async def _patch(self, name: str, change: AdapterPatch, caller: Caller) -> AdapterObject:
        given = change.model_fields_set
        async with self._changing:
            self._visible(name, caller)
            if "active" in given and change.active is not None:
                await self._load_before(name, change)
            if "if_active" in given and self._records[name].active != change.if_active:
                raise ApiError(
                    409,
                    "active_changed",
                    f"found version {self._records[name].active} of {name!r} active, expected {change.if_active}: "
                    "look at it again before changing it",
                    "if_active",
                )
            details = {key: getattr(change, key) for key in given}
            self._watcher.record("patch", caller, name=name, **details)
            pinned = change.pinned if "pinned" in given else self._records[name].pinned
            active = change.active if "active" in given else self._records[name].active
            await self._repin(name, active, pinned)
            with _store_errors():
                if "active" in given:
                    self._records[name] = await self._on_disk(self._store.activate, name, change.active)
                if given & {"allowed_keys", "pinned"}:
                    self._records[name] = await self._on_disk(
                        self._store.update,
                        name,
                        allowed_keys=change.allowed_keys if "allowed_keys" in given else UNCHANGED,
                        pinned=change.pinned if "pinned" in given else UNCHANGED,
                    )
            return self._object(name)

    async def _delete(self, name: str, version: int | None, caller: Caller) -> AdapterObject:
        async with self._changing:
            self._visible(name, caller)
            if version is not None:
                self._find(name, version, caller)
                record = self._records[name]
                others = [v for v in record.versions if v.version != version and v.state == "ready"]
                if record.active == version and others:
                    raise ApiError(
                        409,
                        "version_active",
                        f"found version {version} of {name!r} active beside others: activate another one first, or "
                        f"delete {name!r} as a whole",
                        "version",
                    )
            self._watcher.record("delete", caller, name=name, version=version)
            ending = [v for v in self.versions(name) if version in (None, v.number) and v.record.state == "ready"]
            await self._repin(name, None if version in (None, self._records[name].active) else -1, None)
            with _store_errors():
                record = await self._on_disk(self._store.start_delete, name, version)
            self._take_over(record)
            for each in ending:
                self._drain(each)
            return self._object(name)

    async def _upload(self, name: str, folder: Path, activate: bool, caller: Caller) -> bool:
        self._check_name(name)
        accepted = await self._check(folder)
        async with self._changing:
            self._check_quotas(name, accepted, folder)
            self._watcher.record("upload", caller, name=name, digest=accepted.digest, activate=activate)
            with _store_errors():
                record, version, created = await self._on_disk(
                    self._store.add, name, folder, accepted.digest, accepted.kind, activate=False
                )
            self._records[name] = record
            if created or self._versions[name][version.version].accepted is None:
                self._bring_in(name, version, accepted)
            if activate:
                await self._activate_upload(name, version, created)
            return created

    async def _activate_upload(self, name: str, version: VersionRecord, created: bool) -> None:
        """Load the version to the host and switch to it; a new version that cannot be loaded is taken back."""
        mine = self._versions[name][version.version]
        try:
            await self.plan.load(mine.engine)
            await self._repin(name, version.version, self._records[name].pinned)
            with _store_errors():
                self._records[name] = await self._on_disk(self._store.activate, name, version.version)
        except ApiError:
            if created:
                with _store_errors():
                    record = await self._on_disk(self._store.start_delete, name, version.version)
                self._take_over(record)
                self._drain(mine)
            raise

    def _check_name(self, name: str) -> None:
        if name in self.base_names:
            message = f"found the name {name!r}, which is the base model's served name: choose another"
            raise ApiError(409, "name_conflict", message, "name")
        if problem := name_problem(name, self.base_names):
            raise ApiError(400, "invalid_name", problem, "name")

    async def _check(self, folder: Path) -> Accepted:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._checks, self._intake.check, folder)
        except InvalidAdapterError as error:
            first = error.violations[0] if error.violations else "unreadable"
            more = f" (and {len(error.violations) - 1} more)" if len(error.violations) > 1 else ""
            raise ApiError(
                400, "invalid_adapter", f"the adapter breaks the format: {first}{more}", violations=error.violations
            ) from None

    def _check_quotas(self, name: str, accepted: Accepted, folder: Path) -> None:
        record = self._records.get(name)
        if record is not None and record.with_digest(accepted.digest) is not None:
            return
        size = sum((folder / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE))
        quotas, problem = self._quotas, None
        if record is None and len(self._records) >= quotas.max_adapters:
            problem = f"found {len(self._records)} adapters, which is the limit (max_adapters)"
        elif record is not None and len(record.versions) >= quotas.max_versions:
            problem = f"found {len(record.versions)} versions of {name!r}, which is the limit (max_versions)"
        elif quotas.max_store_bytes is not None and self.store_bytes() + size > quotas.max_store_bytes:
            problem = f"found {self.store_bytes()} of {quotas.max_store_bytes} bytes taken (max_store_bytes)"
        if problem:
            raise ApiError(429, "quota_exceeded", f"{problem}: delete some first", retry_after=60)

    async def _load_before(self, name: str, change: AdapterPatch) -> None:
        """Bring the version that shall be active to the host. Raises ApiError if there is none, or it cannot be."""
        version = self._versions[name].get(change.active or 0)
        if version is None or version.record.state == "draining":
            raise ApiError(404, "version_not_found", f"found no version {change.active} of {name!r}", "active")
        if version.accepted is None:
            raise ApiError(503, "adapter_unavailable", f"{version.id} cannot be served: {version.failure}", "active")
        await self.plan.load(version.engine)

    async def _repin(self, name: str, active: int | None, pinned: bool | None) -> None:
        """Move the name's pin to the version that will be active. active -1: it stays; pinned None: as it is."""
        record = self._records[name]
        was = self._pinned_version(record)
        number = record.active if active == -1 else active
        wanted = record.pinned if pinned is None else pinned
        will = self._versions[name].get(number) if wanted and number is not None else None
        if will is was:
            return
        if will is not None and will.accepted is not None:
            await self.plan.pin(will.engine)
        if was is not None and was.accepted is not None:
            self.plan.unpin(was.engine)

    def _pinned_version(self, record: AdapterRecord) -> Version | None:
        return self._versions[record.name].get(record.active) if record.pinned and record.active is not None else None

    # One version's life

    def _bring_in(self, name: str, record: VersionRecord, accepted: Accepted | None = None) -> None:
        """Make a version of the store known to this server."""
        failure = self._store.problem(record.digest)
        if accepted is None and failure is None:
            try:
                accepted = self._intake.stored(record.kind, record.config, record.digest, record.size_bytes)
            except (InvalidAdapterError, ValueError) as error:
                failure = "; ".join(getattr(error, "violations", (str(error),)))
        engine = EngineAdapter(
            f"{name}@{record.version}", next(self._ids), record.kind, record.digest, self._store.folder(record.digest)
        )
        version = Version(name, record, engine, accepted, failure)
        self._versions.setdefault(name, {})[record.version] = version
        self._by_id[version.id] = version
        if accepted is not None:
            self.plan.add(engine, accepted.need)
            self._watcher.served(version)

    def _take_over(self, record: AdapterRecord) -> None:
        """Let the versions know what the store holds of them now."""
        self._records[record.name] = record
        for stored in record.versions:
            self._versions[record.name][stored.version].record = stored

    def _drain(self, version: Version) -> None:
        task = asyncio.get_running_loop().create_task(self._end(version))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    async def _end(self, version: Version) -> None:
        """Wait for a version's requests, end those that take too long, then free it everywhere."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._quotas.drain_timeout_s):
                await version.idle.wait()
        version.is_deleted = True
        if version.accepted is not None:
            self.plan.fail_waiters(version.engine, adapter_deleted(version))
            for request_id in list(version.running):
                await self._abort(request_id)
            with suppress(TimeoutError):  # who does not read its last bytes keeps nobody waiting
                await asyncio.wait_for(version.idle.wait(), LAST_BYTES_S)
            await self.plan.remove(version.engine)
        async with self._changing:
            record = await self._on_disk(self._store.finish_delete, version.name, version.number)
            del self._by_id[version.id], self._versions[version.name][version.number]
            self._watcher.gone(version)
            if record is not None:
                self._take_over(record)
                return
            del self._records[version.name], self._versions[version.name]
            self._watcher.name_gone(version.name)

    # Helpers

    def _may_use(self, name: str, caller: Caller) -> bool:
        allowed = self._records[name].allowed_keys
        return caller.is_admin or allowed is None or caller.label in allowed

    def _visible(self, name: str, caller: Caller) -> None:
        if name not in self._records or not self._may_use(name, caller):
            message = f"found no adapter {name[:100]!r}; GET /v1/adapters lists them"
            raise ApiError(404, "adapter_not_found", message, "name")

    def _find(self, name: str, version: int, caller: Caller) -> Version:
        self._visible(name, caller)
        found = self._versions[name].get(version)
        if found is None:
            raise ApiError(404, "version_not_found", f"found no version {version} of {name!r}", "version")
        return found

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
        if version.accepted is None:
            return version.as_object("disk", None)
        try:
            return version.as_object(self.plan.tier(version.engine), self.plan.failure(version.engine))
        except KeyError:
            return version.as_object("disk", None)

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks on the thread beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, lambda: work(*args, **kwargs))


async def _to_its_end(change: Coroutine[Any, Any, T]) -> T:
    """Carry a change out whole, also if who asked for it goes away meanwhile."""
    return await asyncio.shield(asyncio.get_running_loop().create_task(change))


def adapter_deleted(version: Version) -> ApiError:
    """What ends a request that outlived its version's deadline."""
    return ApiError(410, "adapter_deleted", f"{version.id} was deleted while the request ran", "model")


@contextmanager
def _store_errors() -> Iterator[None]:
    """The store's own errors as API.md's."""
    try:
        yield
    except StorageFullError as error:
        raise ApiError(507, "storage_full", str(error)) from error
    except StoreError as error:
        raise ApiError(503, "adapter_unavailable", f"the store cannot be changed: {error}", retry_after=60) from error
