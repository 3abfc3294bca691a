"""What a server needs of a store, whichever it is: one folder of one server, or a log that many servers share.

Methods raise KeyError for an unknown name or version, and StoreError if the disk or the network fails.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from adapters.ref import Kind
from adapters.store.records import AdapterRecord, BaseRecord, VersionRecord
from adapters.store.transitions import UNCHANGED, Keys, Unchanged


class Prepared(NamedTuple):
    """What `prepare` found and did. damage: what happened to the files of the same content, if they are not whole.

    upload: where a shared store keeps the files meanwhile; None if it has the content already.
    """

    damage: str | None = None
    upload: str | None = None


class Room(NamedTuple):
    """What a change is decided on. record: of the name, None for a new one. names: how many there are. bytes_more: that
    an upload adds to bytes_used."""

    record: AdapterRecord | None
    names: int
    bytes_used: int
    bytes_more: int


class Look(NamedTuple):
    """What a look at a shared store found. names: whose records others changed since the last one. sent: by the store's
    monotonic clock, when the question went out whose answer was that there is nothing newer."""

    names: set[str]
    sent: float


Check = Callable[[Room], None]
"""Raises what the caller wants to see raised if a change does not fit what the store holds by then."""


class Store(Protocol):
    """An open store. Reads never block, because records are immutable; changes are made one after another.

    A change that returned is durable, one that raised a StoreError did not happen, unless the error says that this is
    not known. A version whose files are not whole stays listed, so that it can be deleted.
    """

    @property
    def secret(self) -> bytes:
        """Random bytes of this server: of the store's folder, or of this start."""

    def close(self) -> None:
        """Let go of the store, once a change under way has returned."""

    def adapters(self) -> list[AdapterRecord]:
        """All records, by name."""

    def get(self, name: str) -> AdapterRecord | None: ...

    def folder(self, digest: str) -> Path:
        """Where the two files of a content are on this machine, once they are."""

    def fetch(self, digest: str) -> Path:
        """`folder`, with the files brought there if they are not (blocks)."""

    def used(self, digest: str) -> AbstractContextManager[None]:
        """Keep the files on this machine, once they are there, while they are read."""

    def renew(self, digest: str) -> bool:
        """Bring files again that are on this machine and not what they were; False if they are (blocks)."""

    def bytes_used(self) -> int:
        """The size of all contents; one that several versions share counts once."""

    def free_bytes(self) -> int | None:
        """Room left for contents; None if it is not known."""

    def holds(self, digest: str) -> bool:
        """Whether a content is in the store, whole, for whatever name."""

    def problem(self, digest: str) -> str | None:
        """Why the files of a version cannot be used; None if they are whole."""

    def stage(self) -> Path:
        """A new empty folder on this machine, for `add` or `discard`."""

    def discard(self, staged: Path) -> None:
        """Remove a folder from `stage`, if it still exists."""

    def prepare(self, folder: Path, digest: str) -> Prepared:
        """Make the checked adapter in `folder`, which came from `stage`, durable. Slow, and beside other changes."""

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
        """Make the checked adapter in `folder`, which came from `stage`, the next version of `name`.

        allowed_keys: set with the version, so that it is private from its first moment; UNCHANGED: what the name has,
        or had before it was deleted. prepared: from `prepare`, by a caller that discards the folder; without it both
        are done here. check: called with what the store holds by then.

        Returns the record, the version, and whether it is new: a ready version with the same content is reused.
        """

    def update(
        self,
        name: str,
        *,
        active: int | Unchanged | None = UNCHANGED,
        allowed_keys: Keys = UNCHANGED,
        pinned: bool | Unchanged = UNCHANGED,
        check: Check | None = None,
    ) -> AdapterRecord:
        """Change the given fields, all or none. Raises ValueError if `active` names a version that is being deleted."""

    def adopt(self, name: str, numbers: Sequence[int], base: BaseRecord) -> AdapterRecord:
        """Record the base of versions that have none: those of a store of schema 1."""

    def start_delete(
        self, name: str, version: int | None, allowed_keys: Keys = UNCHANGED, *, check: Check | None = None
    ) -> AdapterRecord:
        """Mark a version as draining, or all versions (None), after which the name is removed with the last of them.

        The name survives if a version is added meanwhile, but is not pinned any more if all its versions were draining.
        allowed_keys: set with it.
        """

    def finish_delete(self, name: str, version: int) -> AdapterRecord | None:
        """Remove a draining version, and its files if no other needs them. Returns None if the name is gone too."""
