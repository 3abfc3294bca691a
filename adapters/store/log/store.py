"""Owns the adapters that many servers share: every change is an entry of one log, contents are beside it.

Invariant: a change that returned is in the log, and decided on everything before it; one that raised is not, unless the
error says that this is not known.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

from adapters.errors import Advice, StoreSchemaError, StoreUnusableError, store_errors
from adapters.format.files import CONFIG_FILE, README_FILE
from adapters.ref import Kind
from adapters.store import transitions
from adapters.store.folder.layout import blob_bytes, blob_problem
from adapters.store.log.cache import Cache
from adapters.store.log.contents import Contents
from adapters.store.log.entries import (
    PROBES,
    SCHEMA,
    STORE_FILE,
    Action,
    Deleted,
    Entry,
    LogFile,
    Upload,
    new_entry,
)
from adapters.store.log.log import Log, clock
from adapters.store.log.objects import Objects
from adapters.store.log.state import State
from adapters.store.protocol import Check, Look, Prepared, Room
from adapters.store.records import AdapterRecord, BaseRecord, Tombstone, VersionRecord, is_digest, parse
from adapters.store.transitions import UNCHANGED, Keys, Unchanged

OF_A_SHARED_PLACE = Advice(
    full="free space there, which a delete needs too, then retry",
    forbidden="check what this server may do there",
    otherwise="check the network and that place, then try again",
)


class LogStore:
    """An open store, from `open` (see adapters/store/protocol). writer: this server's name in the log, for people."""

    @classmethod
    def open(
        cls, objects: Objects, cache: Path, *, cache_bytes: int | None = None, writer: str = "",
        clock: Callable[[], float] = clock, pause: Callable[[float], None] = time.sleep,
    ) -> "LogStore":  # fmt: skip
        """Open the store at `objects`, creating it if there is none. Raises StoreError."""
        with _errors(objects, "opening"):
            floor = _floor_of(objects)
            return cls(objects, Cache(cache, cache_bytes), floor, writer or secrets.token_hex(4), clock, pause)

    def __init__(
        self, objects: Objects, cache: Cache, floor: int, writer: str, clock: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.secret = secrets.token_bytes(32)
        self._objects, self._cache, self._floor, self._writer = objects, cache, floor, writer
        self._writing = threading.RLock()
        self._is_open = True
        self._contents = Contents(objects, cache)
        try:
            self._log = Log(objects, self._dropped, clock, pause)
            self.catch_up()
            self._contents.find_problems(self._state.uploads)
        except BaseException:
            cache.close()
            raise

    def close(self) -> None:
        with self._writing:
            self._is_open = False
            self._cache.close()

    # What there is

    @property
    def position(self) -> int:
        """The number of the last entry that was read."""
        return self._log.state.position

    def adapters(self) -> list[AdapterRecord]:
        return sorted([*self._state.records.values()], key=lambda record: record.name)

    def get(self, name: str) -> AdapterRecord | None:
        return self._state.records.get(name)

    def deleted(self) -> dict[str, Tombstone]:
        """What is remembered of deleted names."""
        return dict(self._state.deleted)

    def folder(self, digest: str) -> Path:
        assert is_digest(digest), digest
        return self._cache.folder(digest)

    def bytes_used(self) -> int:
        return self._state.bytes_used

    def free_bytes(self) -> None:
        return None

    def holds(self, digest: str) -> bool:
        return digest in self._state.uploads and digest not in self._contents.problems

    def problem(self, digest: str) -> str | None:
        return self._contents.problems.get(digest)

    # Following

    def catch_up(self) -> Look:
        """Read what other servers changed. Raises StoreError."""
        with self._writing, _errors(self._objects, "reading the log"):
            self._log.catch_up()
            names, self._log.changed = self._log.changed, set()
            return Look(names, self._log.looked)

    def fetch(self, digest: str) -> Path:
        with _errors(self._objects, f"fetching {digest}"):
            return self._contents.fetch(digest, self._state.uploads.get(digest))

    def used(self, digest: str) -> AbstractContextManager[None]:
        return self._cache.used(digest)

    def renew(self, digest: str) -> bool:
        with _errors(self._cache.root, f"looking at {digest}"):
            return self._contents.drop_damaged(digest) and self.fetch(digest).is_dir()

    # Uploads

    def stage(self) -> Path:
        with _errors(self._cache.root, "staging an upload"):
            return self._cache.stage()

    def discard(self, staged: Path) -> None:
        self._contents.discard(staged)

    def prepare(self, folder: Path, digest: str) -> Prepared:
        assert is_digest(digest), digest
        with _errors(self._objects, "storing an upload"):
            (folder / README_FILE).unlink(missing_ok=True)
            assert blob_problem(folder) is None, folder
            there = self._state.uploads.get(digest)
            damage = None if there is None else self._contents.damage(digest, there)
            if there is not None and damage is None:
                return Prepared()
            return Prepared(damage, self._contents.put(folder, digest))

    def add(
        self,
        name: str,
        folder: Path,
        digest: str,
        kind: Kind,
        *,
        activate: bool,
        allowed_keys: Keys = UNCHANGED,
        base: BaseRecord | None = None,
        prepared: Prepared | None = None,
        check: Check | None = None,
    ) -> tuple[AdapterRecord, VersionRecord, bool]:
        assert is_digest(digest), digest
        try:
            done = prepared or self.prepare(folder, digest)
            size = blob_bytes(folder)
            version = VersionRecord(
                version=1, digest=digest, kind=kind, config=(folder / CONFIG_FILE).read_bytes().decode("utf-8"),
                size_bytes=size, created=int(time.time()), base=base,
            )  # fmt: skip
            upload: str | None = done.upload
            made: transitions.Added | None = None

            def decide(state: State, room: Room) -> tuple[AdapterRecord, dict[str, Upload]]:
                nonlocal upload, made
                made = transitions.added(
                    name, room.record, state.deleted.get(name), self._floor, version,
                    activate=activate, allowed_keys=allowed_keys,
                )  # fmt: skip
                is_needed = digest not in state.uploads or done.damage is not None
                if is_needed and upload is None:  # its last owner was deleted since `prepare`
                    upload = self._contents.put(folder, digest)
                return made.record, {digest: Upload(id=upload, size_bytes=size)} if is_needed and upload else {}

            entry = self._change("upload", name, decide, check, size)
            if entry is not None and digest in entry.uploads:
                self._contents.used(folder, digest)
            self._contents.keep(folder, digest)
            assert made is not None
            return made.record, made.version, made.is_new
        except StoreUnusableError:
            self._contents.used(folder, digest)  # the version may be there
            raise
        finally:
            if prepared is None:
                self._contents.discard(folder)

    # Changes

    def update(
        self,
        name: str,
        *,
        active: int | Unchanged | None = UNCHANGED,
        allowed_keys: Keys = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
        check: Check | None = None,
    ) -> AdapterRecord:
        def changed(record: AdapterRecord) -> AdapterRecord:
            return transitions.updated(record, active=active, allowed_keys=allowed_keys, pinned=pinned)

        return self._changed("change", name, changed, check)

    def adopt(self, name: str, numbers: Sequence[int], base: BaseRecord) -> AdapterRecord:
        return self._changed("base", name, lambda record: transitions.with_base(record, numbers, base))

    def start_delete(
        self, name: str, version: int | None, allowed_keys: Keys = UNCHANGED, *, check: Check | None = None
    ) -> AdapterRecord:
        return self._changed("delete", name, lambda record: transitions.draining(record, version, allowed_keys), check)

    def finish_delete(self, name: str, version: int) -> AdapterRecord | None:
        def decide(state: State, room: Room) -> tuple[AdapterRecord | None, dict[str, Upload]]:
            return transitions.without(_existing(room, name), version), {}

        self._change("removed", name, decide)
        return self.get(name)

    # Housekeeping

    def sweep(self, now: Callable[[], float] | None = None) -> int:
        """Remove files of uploads that were broken off. Returns how many objects went. now: unix seconds; by default
        those of the place, since this machine's clock may be wrong. Raises StoreError."""
        with _errors(self._objects, "sweeping"):
            return self._contents.sweep(self._state.uploads, now)

    # How a change is made

    @property
    def _state(self) -> State:
        return self._log.state

    def _changed(
        self, action: Action, name: str, change: Callable[[AdapterRecord], AdapterRecord], check: Check | None = None
    ) -> AdapterRecord:
        made: list[AdapterRecord] = []

        def decide(state: State, room: Room) -> tuple[AdapterRecord, dict[str, Upload]]:
            made.append(change(_existing(room, name)))
            return made[-1], {}

        self._change(action, name, decide, check)
        return made[-1]

    def _change(
        self,
        action: Action,
        name: str,
        decide: Callable[[State, Room], tuple[AdapterRecord | None, dict[str, Upload]]],
        check: Check | None = None,
        upload_bytes: int = 0,
    ) -> Entry | None:
        """Append what `decide` says; None if the record stays what it is."""

        def entry(state: State, number: int, attempt: str) -> Entry | None:
            before = state.records.get(name)
            room = Room(before, len(state.records), state.bytes_used, upload_bytes)
            record, uploads = decide(state, room)
            if check is not None:
                check(room if uploads else room._replace(bytes_more=0))
            if record == before and not uploads:
                return None
            deleted = None
            if record is None and before is not None:
                deleted = Deleted.of(Tombstone(before.highest, before.allowed_keys))
            return new_entry(
                number, attempt, self._writer, action, name, record=record, deleted=deleted, uploads=uploads
            )

        with self._writing, _errors(self._objects, f"changing {name!r}"):
            assert self._is_open, "the store is closed"
            return self._log.append(entry)

    def _dropped(self, digest: str, upload: Upload, is_own: bool) -> None:
        """Nobody needs these files any more: who wrote the entry that says so removes them."""
        if digest not in self._state.uploads:
            self._contents.forget(digest)
        else:  # it was uploaded again, because these were damaged
            self._contents.problems.pop(digest, None)
        if is_own:
            self._contents.remove(digest, upload.id)


def read_log_file(objects: Objects) -> LogFile:
    """STORE.json of a log store. Raises StoreSchemaError, StoreUnusableError or OSError."""
    raw = objects.get(STORE_FILE)
    if raw is None:
        raise StoreUnusableError(f"{objects}: found no {STORE_FILE}, expected a store")
    try:
        found = parse(LogFile, raw)
    except ValueError as error:
        raise StoreUnusableError(f"{objects}: {STORE_FILE} is not that of a shared store: {error}") from None
    if found.number != SCHEMA:
        raise StoreSchemaError(f"the store {objects}: found schema {found.number}, expected {SCHEMA}")
    return found


def _floor_of(objects: Objects) -> int:
    """The number above which new names start, in a store that is created if there is none.

    A place that overwrites what it was told to create only if there is none is refused: by trying.
    """
    probe = f"{PROBES}{uuid4().hex}"
    try:
        created = (objects.create(probe, b"first"), objects.create(probe, b"second"))
        if created != (True, False) or objects.get(probe) != b"first":
            raise StoreUnusableError(
                f"the store {objects}: found a place that overwrites an object which it was told to create only if "
                "there is none; expected conditional writes (S3: If-None-Match), without which changes are lost"
            )
    finally:
        objects.remove(probe)
    if objects.get(STORE_FILE) is None:
        objects.create(STORE_FILE, LogFile(kind="log", schema=SCHEMA).file_bytes())
    return read_log_file(objects).floor


def _existing(room: Room, name: str) -> AdapterRecord:
    if room.record is None:
        raise KeyError(name)
    return room.record


@contextmanager
def _errors(place: object, doing: str) -> Iterator[None]:
    """Turn an OSError into an error of the store."""
    with store_errors(str(place), doing, OF_A_SHARED_PLACE):
        yield
