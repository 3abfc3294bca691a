"""Owns every change to the adapters of a running server: uploads, which version is active, who may use it, deletes.

Invariants: a change is recorded before it is made, and stored before anyone sees it; it is made whole or not at all,
even if its client goes away; changes to one name are made one at a time, and wait for no other name's. All of it runs
on one event loop; the disk is touched on threads beside it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from adapters.errors import InvalidAdapterError, StoreError
from adapters.store import UNCHANGED, AdapterRecord, Check, Keys, Room, Store
from perft.threads import compute_alone
from server.auth.keys import Caller
from server.errors import ActiveChangedError, InvalidRequestError, ServerError, VersionActiveError, VersionNotFoundError
from server.following.following import Alone, Following
from server.following.others import OthersChanges
from server.registry.deletion import Deletions
from server.registry.pins import Pins, load_timeout
from server.registry.quotas import Quotas, bytes_of, check_quotas
from server.registry.registry import Registry, check_name
from server.registry.stored_versions import StoredVersions
from server.registry.version import AdapterView, Version, unservable
from server.registry.write_queue import WriteQueue
from server.residency.scheduler import ResidencyScheduler
from server.uploads.validate import UploadValidator

logger = logging.getLogger(__name__)


class ServiceEvents(Protocol):
    """What is notified of changes: vLLM's table of names, and the metrics."""

    def version_added(self, version: Version) -> None: ...

    def version_removed(self, version: Version) -> None: ...

    def name_removed(self, name: str) -> None: ...

    def upload_finished(self, result: str) -> None: ...


class AuditTrail(Protocol):
    """The record of every change (registry/audit); from any thread. Raises AuditLogError: then nothing is changed."""

    def record(self, action: str, caller: Caller, **details: Any) -> None: ...


class AdapterService:
    """See the module. Reads are the Registry's."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        scheduler: ResidencyScheduler,
        validator: UploadValidator,
        quotas: Quotas,
        audit: AuditTrail,
        events: ServiceEvents,
        abort: Callable[[str], Awaitable[None]],
        following: Following | None = None,
    ) -> None:
        self._registry, self._store, self._scheduler = registry, store, scheduler
        self._validator, self._quotas, self._audit, self._events = validator, quotas, audit, events
        self._pins = Pins(scheduler, registry.known, quotas.load_timeout_s)
        self._deletions = Deletions(scheduler, abort, self._remove, quotas.drain_timeout_s)
        self._stored = StoredVersions(registry, store, scheduler, validator, events.version_added)
        self._check_room = partial(check_quotas, quotas)
        self._queue = WriteQueue()
        self.following: Following = following or Alone()
        self._others = OthersChanges[Version](registry, store.get, self._stored.add, self._deletions.start)
        self._validation_thread = ThreadPoolExecutor(1, "perft-validate", initializer=compute_alone)

    async def start(self) -> None:
        """Bring in what the store holds; go on with deletes that were under way; load what is pinned."""
        records = await self._stored.bring_in(self._queue)
        for version in self._registry.all_versions():
            if version.is_draining:
                self._deletions.start(version)
        for record in records:
            await self._restore_pin(record.name)

    async def take_over(self, name: str) -> None:
        """Bring this server up to what the store says of a name, after another server changed it."""
        async with self._queue.name_lock(name):
            is_there = self._others.take_over(name)
            for changed in {*self._stored.mend_all(), *([name] if is_there else [])}:
                self._queue.start(self._restore_pin(changed))

    async def close(self) -> None:
        """Finish the changes under way and close the store. Deletes go on at the next start."""
        await self._queue.drain()
        await self._deletions.close()
        await self._queue.in_thread(self._store.close)
        self._queue.close()
        self._validation_thread.shutdown(wait=False)

    # Uploads

    def stage(self) -> Path:
        """Make a folder for an upload (blocks). Raises StoreError."""
        return self._store.stage()

    def discard(self, staged: Path) -> None:
        """Remove a staged folder, if it still exists (blocks)."""
        self._store.discard(staged)

    async def upload(
        self,
        name: str,
        folder: Path,
        activate: bool,
        caller: Caller,
        *,
        allowed_keys: Keys = UNCHANGED,
        only_if_new: bool = False,
        replaces: bool = True,
        source: str | None = None,
    ) -> tuple[AdapterView, bool]:
        """Make a staged folder the next version of `name`; False if its content is a version already.

        allowed_keys: set together with the version; UNCHANGED: what the name has, or had before it was deleted.
        only_if_new: content that is a version already changes nothing. replaces: other content may be active. source:
        where it is from, for the record. Raises ServerError, InvalidAdapterError or StoreError.
        """
        await self.following.fresh(name)
        recorded = {} if source is None else {"source": source}
        upload = self._upload(name, folder, activate, caller, allowed_keys, only_if_new, replaces, recorded)
        try:
            adapter, created = await self._queue.finish(upload)
            if activate or allowed_keys is not UNCHANGED:  # a version that nothing selects yet takes nothing back
                await self.following.committed()
        except Exception as error:
            self._events.upload_finished(upload_result(error))
            raise
        self._events.upload_finished("created" if created else "existing")
        return adapter, created

    async def _upload(
        self, name: str, folder: Path, activate: bool, caller: Caller, keys: Keys, only_if_new: bool, replaces: bool,
        recorded: Mapping[str, str],
    ) -> tuple[AdapterView, bool]:  # fmt: skip
        check_name(name, self._registry.base_names)
        accepted = await asyncio.get_running_loop().run_in_executor(
            self._validation_thread, self._validator.check, folder
        )
        prepared = await self._queue.beside(self._store.prepare, folder, accepted.digest)
        async with self._queue.name_lock(name):
            before = self._registry.record(name)
            if not replaces:
                _check_replaces_nothing(before, accepted.digest)
            is_known = before is not None and before.with_digest(accepted.digest) is not None
            is_nothing = is_known and only_if_new  # but a damaged blob is repaired
            if is_nothing:
                activate, keys = False, UNCHANGED
            later = keys if activate and (is_known or _is_wider(keys, before)) else UNCHANGED  # with the activation
            details = {"name": name, "digest": accepted.digest, "activate": activate, **recorded}
            details |= {} if keys is UNCHANGED else {"allowed_keys": keys}
            if not is_known:
                bytes_more = 0 if self._store.holds(accepted.digest) else bytes_of(folder)
                self._check_room(Room(before, self._registry.count(), self._registry.store_bytes(), bytes_more))
            if not is_nothing:
                await self._record("upload", caller, **details)
            record, stored, created = await self._queue.in_thread(
                self._store.add,
                name,
                folder,
                accepted.digest,
                accepted.kind,
                activate=False,
                allowed_keys=keys if later is UNCHANGED else UNCHANGED,
                base=self._validator.base_record,
                prepared=prepared,
                check=None if is_known else self._check_room,
            )
            if created:
                self._stored.add(name, stored, accepted)
            self._others.take_over(name)
            for mended in self._stored.mend(accepted.digest):
                self._queue.start(self._restore_pin(mended))
            if activate:
                kept = (before or record).allowed_keys if created else UNCHANGED
                await self._activate_upload(self._registry.known(name, stored.version), later, kept, caller)
            return replace(self._registry.view(name, caller), uploaded=stored.version), created

    async def _activate_upload(self, version: Version, keys: Keys, keys_before: Keys, caller: Caller) -> None:
        """Load the version to the host and activate it, with `keys`. keys_before: of the name before the version, if
        that is new: it is removed again if it cannot be loaded."""
        name, number = version.name, version.number
        try:
            await self._load(version, "name")
            record = self._registry.record(name)
            wanted = version if record is not None and record.pinned else None
            async with self._pins.moved(name, wanted):
                await self._queue.in_thread(self._store.update, name, active=number, allowed_keys=keys)
                self._others.take_over(name)
        except (ServerError, StoreError) as error:
            if keys_before is not UNCHANGED:
                await self._take_back(version, keys_before, caller, error)
            raise

    async def _take_back(self, version: Version, keys_before: Keys, caller: Caller, error: Exception) -> None:
        """Remove a version that cannot be activated, as far as that is possible: the caller gets the first error."""
        because = upload_result(error)
        try:
            await self._record("delete", caller, name=version.name, version=version.number, because=because)
        except ServerError as unrecorded:
            logger.error("%s is removed again without a record: %s", version.id, unrecorded.message)
        try:
            await self._start_delete(version.name, version.number, keys_before)
        except StoreError as failed:
            logger.error("%s cannot be activated, and stays: it could not be removed again: %s", version.id, failed)

    # Changes and deletes

    async def patch(self, name: str, changes: Mapping[str, Any], caller: Caller) -> AdapterView:
        """Make all `changes` (active, if_active, allowed_keys, pinned) or none of them.

        A version is on the host before it becomes active. Raises ServerError or StoreError.
        """
        await self.following.fresh(name)
        adapter = await self._queue.finish(self._patch(name, changes, caller))
        await self.following.committed()
        return adapter

    async def _patch(self, name: str, changes: Mapping[str, Any], caller: Caller) -> AdapterView:
        async with self._queue.name_lock(name):
            record = self._registry.visible(name, caller)
            check = _if_active(changes)
            check(Room(record, 0, 0, 0))
            if changes.get("active") is not None:
                await self._load(_to_activate(self._registry, name, changes["active"]), "active")
            stored = {key: value for key, value in changes.items() if key != "if_active"}
            async with self._pins.changed(record, _as_stored(stored)):
                await self._record("patch", caller, name=name, **changes)
                await self._queue.in_thread(self._store.update, name, check=check, **stored)
                self._others.take_over(name)
            return self._registry.view(name, caller)

    async def delete(self, name: str, number: int | None, caller: Caller) -> AdapterView:
        """Start the delete of a version, or of all (None): nothing new is admitted, running requests may finish.

        Raises ServerError or StoreError.
        """
        await self.following.fresh(name)
        adapter = await self._queue.finish(self._delete(name, number, caller))
        await self.following.committed()
        return adapter

    async def _delete(self, name: str, number: int | None, caller: Caller) -> AdapterView:
        async with self._queue.name_lock(name):
            record = self._registry.visible(name, caller)
            if number is not None:
                self._registry.version(name, number, caller)
                _check_not_active_of_several(record, number)
            ends_active = number in (None, record.active)
            async with self._pins.moved(name, None) if ends_active else nullcontext():
                await self._record("delete", caller, name=name, version=number)
                await self._start_delete(name, number)
            return self._registry.view(name, caller)

    async def _start_delete(self, name: str, number: int | None, allowed_keys: Keys = UNCHANGED) -> None:
        """Let a version, or all of a name, drain. allowed_keys: set with it."""
        await self._queue.in_thread(self._store.start_delete, name, number, allowed_keys)
        self._others.take_over(name)

    async def _remove(self, version: Version) -> None:
        """The end of a draining version. Raises StoreError."""
        await self.following.may_remove()
        async with self._queue.name_lock(version.name):
            try:
                await self._queue.beside(self._store.finish_delete, version.name, version.number)
            except KeyError:
                logger.debug("%s was removed by another server", version.id)
            record = self._others.without(version)
            self._registry.remove_version(version, record)
            self._events.version_removed(version)
            if record is None:
                self._events.name_removed(version.name)

    # What a change needs

    async def _load(self, version: Version, param: str) -> None:
        """Bring a version that is to become active to the host. Raises AdapterUnavailableError."""
        if version.accepted is None:
            raise unservable(version, param)
        async with load_timeout(version, "on the host", self._quotas.load_timeout_s):
            await self._scheduler.load(version.ref)

    async def _record(self, action: str, caller: Caller, **details: Any) -> None:
        """Record a change in the audit log. Raises AuditLogError: then the change is not made."""
        await self._queue.in_thread(self._audit.record, action, caller, **details)

    async def _restore_pin(self, name: str) -> None:
        async with self._queue.name_lock(name):
            await self._pins.restore(self._registry.record(name))


def upload_result(error: Exception) -> str:
    """How the metrics name an upload's end: the error's code, "error" for an unforeseen one."""
    return error.code if isinstance(error, ServerError | InvalidAdapterError | StoreError) else "error"


def _active_changed(record: AdapterRecord, expected: int | None) -> ActiveChangedError:
    return ActiveChangedError(
        f"found version {record.active} of {record.name!r} active, expected {expected}; read the adapter again before "
        "you change it"
    )


def _if_active(changes: Mapping[str, Any]) -> Check:
    """What raises ActiveChangedError where another version is active than the patch expects."""

    def check(room: Room) -> None:
        if room.record is not None and changes.get("if_active", room.record.active) != room.record.active:
            raise _active_changed(room.record, changes["if_active"])

    return check


def _to_activate(registry: Registry, name: str, number: int) -> Version:
    version = registry.numbered(name, number)
    if version is None or version.is_draining:
        raise VersionNotFoundError(name, number, param="active")
    return version


def _check_replaces_nothing(record: AdapterRecord | None, digest: str) -> None:
    """Raises InvalidRequestError if other content is active than that with the digest."""
    if record is None or record.active is None or record.version(record.active).digest == digest:
        return
    raise InvalidRequestError(
        f"{record.name!r} has already been loaded, with other content (version {record.active} is active); set "
        "load_inplace to replace it",
        param="load_inplace",
    )


def _check_not_active_of_several(record: AdapterRecord, number: int) -> None:
    others = [v for v in record.versions if v.version != number and v.state == "ready"]
    if record.active == number and others:
        raise VersionActiveError(
            f"found version {number} of {record.name!r} active beside others; activate another one first, or delete "
            f"{record.name!r} as a whole"
        )


def _as_stored(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A patch as fields of the record."""
    keys = changes.get("allowed_keys")
    return dict(changes) if keys is None else {**changes, "allowed_keys": tuple(keys)}


def _is_wider(keys: Keys, before: AdapterRecord | None) -> bool:
    """Whether `keys` let somebody use the active version of a name who may not now. None is everybody."""
    if keys is UNCHANGED or before is None or before.active is None or before.allowed_keys is None:
        return False
    return keys is None or not set(keys) <= set(before.allowed_keys)
