"""Owns the order of changes: entry N+1 is created only if there is none, and whoever creates it has read all before.

Invariant: `state` is what the entries up to its position say; an entry that `append` returned is durable and in it.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EAGAIN, EDQUOT, ENOSPC, ENXIO, EPERM, EROFS
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel

from adapters.errors import StoreUnusableError
from adapters.store.log.entries import (
    SNAPSHOTS,
    STORE_FILE,
    Entry,
    Snapshot,
    Upload,
    entry_key,
    number_of,
    snapshot_key,
)
from adapters.store.log.objects import Objects
from adapters.store.log.state import State
from adapters.store.records import parse

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=BaseModel)
SNAPSHOT_EVERY = 256
SNAPSHOTS_KEPT = 3
PATIENCE_S = 15.0
"""How long an append whose answer was lost is asked after."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 2.0
REFUSED = {EACCES, EDQUOT, ENOSPC, ENXIO, EPERM, EROFS}
"""What a place says that did nothing, and will not when it is asked again. EAGAIN: it did nothing yet."""


def clock() -> float:
    """Monotonic seconds, those too in which the machine slept: after that, a server must look again."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Log:
    """The log at `objects`. clock: monotonic seconds. dropped: called with contents whose files nobody needs any more,
    once the entry that says so is read or written; is_own: whether this log wrote it.

    looked: when, by `clock`, the last look was sent that found nothing newer. changed: names that others changed, until
    it is emptied. No lock: the caller takes turns.
    """

    def __init__(
        self,
        objects: Objects,
        dropped: Callable[[str, Upload, bool], None],
        clock: Callable[[], float] = clock,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._objects, self._dropped, self._clock, self._pause = objects, dropped, clock, pause
        self.state = self._newest_snapshot()
        self._last_id: str | None = None
        self.looked = float("-inf")
        self.changed: set[str] = set()

    def catch_up(self) -> None:
        """Read what others appended. Raises OSError or StoreUnusableError."""
        while True:
            sent = self._clock()
            entry = self._read(self.state.position + 1)
            if entry is None:
                self._check_last()
                self.looked = sent
                return
            self._take_over(entry, is_own=False)
            self.changed.add(entry.name)

    def append(self, decide: Callable[[State, int, str], Entry | None]) -> Entry | None:
        """Append what `decide` makes of the newest state (state, number, id of the attempt); None changes nothing.

        `decide` is called again if another writer came first. What it raises is raised, and nothing is appended.
        Raises OSError if the place cannot be reached, StoreUnusableError if it is not known what became of the entry.
        """
        while True:
            self.catch_up()
            entry = decide(self.state, self.state.position + 1, uuid4().hex)
            if entry is None:
                return None
            if self._create(entry):
                self._take_over(entry, is_own=True)
                self._snapshot()
                return entry

    def _create(self, entry: Entry) -> bool:
        """Create an entry; False if another writer was first. An answer that was lost is asked for again: the entry's
        id tells whose it is. Raises OSError if it was refused, StoreUnusableError if that is not known."""
        deadline, pause_s, is_certain = self._clock() + PATIENCE_S, FIRST_PAUSE_S, True
        while True:
            failed: OSError | None = None
            try:
                if self._objects.create(entry_key(entry.number), entry.file_bytes()):
                    return True
                found = self._read(entry.number)
                if found is not None:
                    return found.id == entry.id
            except OSError as error:
                is_certain = is_certain and error.errno in {*REFUSED, EAGAIN}
                if is_certain and (error.errno in REFUSED or self._clock() >= deadline):
                    raise
                failed = error
            if self._clock() >= deadline:
                raise StoreUnusableError(
                    f"entry {entry.number} of the store {self._objects} was sent, and no answer came in "
                    f"{PATIENCE_S:g} s: {failed or 'it can neither be created nor read'}; the change may have been "
                    "made: read the adapter before you try again"
                ) from failed
            self._pause(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _check_last(self) -> None:
        """That there is no next entry is believed only of a place that still has the last one: a bucket that was
        emptied, or a folder that is not mounted any more, has none either. Raises StoreUnusableError."""
        number = self.state.position
        key = entry_key(number) if number else STORE_FILE
        last = self._read(number) if number else None
        is_there = last is not None or (not number and self._objects.get(STORE_FILE) is not None)
        if not is_there or (last is not None and self._last_id not in (None, last.id)):
            raise StoreUnusableError(
                f"{self._objects}: found {'another' if is_there else 'no'} {key}, expected what this server has read: "
                "check that the folder is still mounted, and the bucket not emptied; if the log was restored from a "
                "copy, start all its servers again"
            )
        self._last_id = last.id if last is not None else None

    def _take_over(self, entry: Entry, is_own: bool) -> None:
        self._last_id = entry.id
        for digest, upload in self.state.apply(entry):
            self._dropped(digest, upload, is_own)

    def _read(self, number: int) -> Entry | None:
        key = entry_key(number)
        raw = self._objects.get(key)
        if raw is None:
            return None
        entry = self._parsed(Entry, key, raw)
        if entry.number != number:
            raise StoreUnusableError(f"{self._objects}: {key}: found entry {entry.number}; restore it from a copy")
        return entry

    def _parsed(self, model: type[Model], key: str, raw: bytes) -> Model:
        try:
            return parse(model, raw)
        except ValueError as error:
            raise StoreUnusableError(
                f"{self._objects}: {key} is damaged, or of a newer version: {error}; restore it from a copy, or use a "
                "newer version of the server"
            ) from None

    def _newest_snapshot(self) -> State:
        """A damaged snapshot is passed over: the log has all that it has."""
        keys = [found.key for found in self._objects.list(SNAPSHOTS) if number_of(found.key) is not None]
        for key in reversed(keys):
            raw = self._objects.get(key)
            if raw is None:
                continue
            with suppress(StoreUnusableError):
                return State.of(self._parsed(Snapshot, key, raw))
            logger.error("store: %s: %s is damaged, and passed over", self._objects, key)
        return State()

    def _snapshot(self) -> None:
        """Now and then, for a faster start. A failure costs nothing else."""
        number = self.state.position
        if number % SNAPSHOT_EVERY:
            return
        try:
            self._objects.create(snapshot_key(number), self.state.snapshot().file_bytes())
            keys = [found.key for found in self._objects.list(SNAPSHOTS)]
            for key in keys[:-SNAPSHOTS_KEPT]:
                self._objects.remove(key)
        except OSError as error:
            logger.warning("store: snapshot %d of %s was not written: %s", number, self._objects, error)
