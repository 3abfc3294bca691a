"""Owns every change to the adapters of a running server: uploads, what is active, who may use it, deletes.

On top of the store (what is durable) and the residency plan (what is where). Invariants: a change is on record before
it is made, and in the store before anybody sees it; it is made whole or not at all, also if its client goes away; one
at a time of each name. Everything runs on one event loop; the disk is touched on one thread beside it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from adapters import AdapterRecord, InvalidAdapterError, Store, VersionRecord
from adapters.ref import AdapterRef
from perft.threads import compute_alone
from server.api.schemas import AdapterObject, AdapterPatch
from server.auth.keys import Caller
from server.errors import ApiError
from server.registry.deletion import Deletions
from server.registry.names import check_name
from server.registry.pins import Pins, in_time
from server.registry.quotas import Quotas, bytes_of, check_quotas
from server.registry.registry import Registry
from server.registry.version import Version
from server.registry.write_queue import WriteQueue, store_errors
from server.residency.scheduler import ResidencyScheduler
from server.uploads.validate import UploadValidator, ValidatedAdapter

logger = logging.getLogger(__name__)


class ServiceEvents(Protocol):
    """Who is told what becomes of versions: vLLM's table of names, the metrics, the audit log (from any thread)."""

    def served(self, version: Version) -> None: ...

    def gone(self, version: Version) -> None: ...

    def name_gone(self, name: str) -> None: ...

    def uploaded(self, result: str) -> None: ...

    def record(self, action: str, caller: Caller, **details: Any) -> None: ...


class AdapterService(Registry):
    """See the module; what there is to read is the Registry's."""

    def __init__(
        self,
        store: Store,
        plan: ResidencyScheduler,
        intake: UploadValidator,
        base_names: list[str],
        quotas: Quotas,
        watcher: ServiceEvents,
        abort: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(store, plan, base_names)
        self._intake, self._quotas, self._watcher = intake, quotas, watcher
        self._pins = Pins(plan, quotas.load_timeout_s)
        self._endings = Deletions(plan, abort, self._remove, quotas.drain_timeout_s)
        self._ids = count(1)
        self._changes = WriteQueue()
        self._checks = ThreadPoolExecutor(1, "perft-checks", initializer=compute_alone)

    async def start(self) -> None:
        """Bring in what the store holds; go on with deletes that were under way; load what is pinned."""
        records = self._store.adapters()
        for record in records:
            for version in record.versions:
                self._bring_in(record.name, version)
            self._take_over(record)
        for known in list(self._by_id.values()):
            if known.record.state == "draining":
                self._endings.start(known)
        for record in records:
            await self._pin_again(record.name)

    async def close(self) -> None:
        """Finish the changes under way and let the store go. Deletes go on at the next start."""
        await self._changes.finish()
        await self._endings.close()
        await self._changes.on_disk(self._store.close)
        self._changes.close()
        self._checks.shutdown(wait=False)

    def stage(self) -> Path:
        """A new folder for an upload (blocks)."""
        with store_errors():
            return self._store.stage()

    def discard(self, staged: Path) -> None:
        """Remove it, if it is still there (blocks)."""
        self._store.discard(staged)

    async def upload(self, name: str, folder: Path, activate: bool, caller: Caller) -> tuple[AdapterObject, bool]:
        """A staged folder becomes the next version of `name`; False: that content was one already.

        Raises ApiError with the codes of API.md.
        """
        try:
            adapter, created = await self._changes.whole(self._upload(name, folder, activate, caller))
        except ApiError as error:
            self._watcher.uploaded(error.code)
            raise
        except Exception:
            self._watcher.uploaded("error")
            raise
        self._watcher.uploaded("created" if created else "existing")
        return adapter, created

    async def patch(self, name: str, change: AdapterPatch, caller: Caller) -> AdapterObject:
        """Change what is given, all or nothing. A version is on the host before it becomes the active one."""
        return await self._changes.whole(self._patch(name, change, caller))

    async def delete(self, name: str, version: int | None, caller: Caller) -> AdapterObject:
        """Start a delete: nothing new is admitted, what runs may finish until the deadline."""
        return await self._changes.whole(self._delete(name, version, caller))

    async def _patch(self, name: str, change: AdapterPatch, caller: Caller) -> AdapterObject:
        given = change.model_dump(include=change.model_fields_set)
        async with self._changes.of(name):
            self._check_visible(name, caller)
            active = self._records[name].active
            if given.get("if_active", active) != active:
                raise _active_changed(self._records[name], change.if_active)
            if change.active is not None:
                await self._load(self._ready(name, change.active), "active")
            changes = {key: value for key, value in given.items() if key != "if_active"}
            wanted = self._to_pin(self._records[name].changed(**_as_stored(changes)))
            async with self._pins.moved(name, wanted), self._changes.one_at_a_time:
                await self._record("patch", caller, name=name, **given)
                self._take_over(await self._changes.in_store(self._store.update, name, **changes))
            return self._object(name)

    async def _delete(self, name: str, version: int | None, caller: Caller) -> AdapterObject:
        async with self._changes.of(name):
            self._check_visible(name, caller)
            record = self._records[name]
            if version is not None:
                self._find(name, version, caller)
                _check_is_no_active_one_of_several(record, version)
            stays = version not in (None, record.active)
            async with self._pins.moved(name, self._to_pin(record) if stays else None):
                await self._record("delete", caller, name=name, version=version)
                await self._start_delete(name, version)
            return self._object(name)

    async def _start_delete(self, name: str, number: int | None) -> None:
        """Let a version, or all of a name, drain."""
        async with self._changes.one_at_a_time:
            ending = [v for v in self.versions(name) if number in (None, v.number) and v.record.state == "ready"]
            self._take_over(await self._changes.in_store(self._store.start_delete, name, number))
            for each in ending:
                self._endings.start(each)

    async def _upload(self, name: str, folder: Path, activate: bool, caller: Caller) -> tuple[AdapterObject, bool]:
        check_name(name, self.base_names)
        accepted = await self._check(folder)
        async with self._changes.of(name):
            async with self._changes.one_at_a_time:
                self._check_quotas(name, accepted, folder)
                await self._record("upload", caller, name=name, digest=accepted.digest, activate=activate)
                record, stored, created = await self._changes.in_store(
                    self._store.add, name, folder, accepted.digest, accepted.kind, activate=False
                )
                if created:
                    self._bring_in(name, stored, accepted)
                self._take_over(record)
                self._mend(accepted.digest)
            if activate:
                await self._activate_upload(self._versions[name][stored.version], created, caller)
            return self._object(name), created

    async def _activate_upload(self, version: Version, created: bool, caller: Caller) -> None:
        """Load the version to the host and switch to it; a new version that cannot be loaded is taken back."""
        name, number = version.name, version.number
        try:
            await self._load(version, "name")
            wanted = version if self._records[name].pinned else None
            async with self._pins.moved(name, wanted), self._changes.one_at_a_time:
                self._take_over(await self._changes.in_store(self._store.update, name, active=number))
        except ApiError as error:
            if created:
                await self._take_back(version, caller, error)
            raise

    async def _take_back(self, version: Version, caller: Caller, error: ApiError) -> None:
        try:
            await self._record("delete", caller, name=version.name, version=version.number, because=error.code)
        except ApiError as unrecorded:
            logger.error("%s is taken back without a record: %s", version.id, unrecorded.message)
        await self._start_delete(version.name, version.number)

    # What a change needs

    async def _check(self, folder: Path) -> ValidatedAdapter:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._checks, self._intake.check, folder)
        except InvalidAdapterError as error:
            first = error.violations[0] if error.violations else "unreadable"
            more = f" (and {len(error.violations) - 1} more)" if len(error.violations) > 1 else ""
            message = f"the adapter breaks the format: {first}{more}"
            raise ApiError(400, "invalid_adapter", message, violations=error.violations) from None

    def _check_quotas(self, name: str, accepted: ValidatedAdapter, folder: Path) -> None:
        record = self._records.get(name)
        if record is None or record.with_digest(accepted.digest) is None:
            is_stored = any(version.record.digest == accepted.digest for version in self._by_id.values())
            bytes_more = 0 if is_stored else bytes_of(folder)
            check_quotas(self._quotas, record, len(self._records), self.store_bytes(), bytes_more)

    def _ready(self, name: str, number: int) -> Version:
        version = self._versions[name].get(number)
        if version is None or version.record.state == "draining":
            raise ApiError(404, "version_not_found", f"found no version {number} of {name!r}", "active")
        return version

    async def _load(self, version: Version, param: str) -> None:
        """Bring a version that shall be active to the host. Raises ApiError adapter_unavailable."""
        if version.accepted is None:
            raise self._unservable(version, param)
        async with in_time(version, "on the host", self._quotas.load_timeout_s):
            await self.plan.load(version.engine)

    def _to_pin(self, record: AdapterRecord) -> Version | None:
        return self._versions[record.name][record.active] if record.pinned and record.active is not None else None

    # One version's life

    def _bring_in(self, name: str, record: VersionRecord, accepted: ValidatedAdapter | None = None) -> None:
        """Make a version of the store known to this server."""
        failure = self._store.problem(record.digest)
        if accepted is None and failure is None:
            try:
                accepted = self._intake.stored(record, self._store.folder(record.digest))
            except (InvalidAdapterError, ValueError) as error:
                failure = "; ".join(getattr(error, "violations", (str(error),)))
        engine = AdapterRef(
            f"{name}@{record.version}", next(self._ids), record.kind, record.digest, self._store.folder(record.digest)
        )
        version = Version(name, record, engine, accepted, failure)
        self._enter(version)
        if accepted is not None:
            self.plan.add(engine, accepted.need)
            self._watcher.served(version)

    def _mend(self, digest: str) -> None:
        """A content came again: versions whose files were damaged have them back."""
        for version in list(self._by_id.values()):
            if version.record.digest == digest and version.accepted is None and version.record.state == "ready":
                self._bring_in(version.name, version.record)
                self._changes.begin(self._pin_again(version.name))

    async def _pin_again(self, name: str) -> None:
        """Bring what is pinned to the device, as far as that is possible."""
        async with self._changes.of(name):
            if name not in self._records:
                return
            try:
                async with self._pins.moved(name, self._to_pin(self._records[name])):
                    pass
            except ApiError as error:
                logger.warning("%s is pinned, but not on the device: %s", name, error.message)

    async def _remove(self, version: Version) -> None:
        """The end of a draining version. Raises StoreError."""
        async with self._changes.of(version.name), self._changes.one_at_a_time:
            record = await self._changes.on_disk(self._store.finish_delete, version.name, version.number)
            self._take_out(version, record)
            self._watcher.gone(version)
            if record is None:
                self._watcher.name_gone(version.name)

    async def _record(self, action: str, caller: Caller, **details: Any) -> None:
        """Put a change on record. Raises ApiError if that is not possible: then it is not made."""
        await self._changes.on_disk(self._watcher.record, action, caller, **details)


def _active_changed(record: AdapterRecord, expected: int | None) -> ApiError:
    return ApiError(
        409,
        "active_changed",
        f"found version {record.active} of {record.name!r} active, expected {expected}: look at it again before "
        "changing it",
        "if_active",
    )


def _check_is_no_active_one_of_several(record: AdapterRecord, version: int) -> None:
    others = [v for v in record.versions if v.version != version and v.state == "ready"]
    if record.active == version and others:
        raise ApiError(
            409,
            "version_active",
            f"found version {version} of {record.name!r} active beside others: activate another one first, or delete "
            f"{record.name!r} as a whole",
            "version",
        )


def _as_stored(changes: dict[str, Any]) -> dict[str, Any]:
    """A patch as fields of the record."""
    keys = changes.get("allowed_keys")
    return changes if keys is None else {**changes, "allowed_keys": tuple(keys)}
