"""Owns what a log holds: entries, each with what one change made of one name; and snapshots, the sum of all so far.

An entry has the record that came out, and not what was asked for: whoever reads it, now or in another version of this
code, gets the same.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.store.records import AdapterRecord, Number, Tombstone

DIGITS = 12
"""Of a number in a key, so that keys in order are numbers in order."""
LOG, SNAPSHOTS, BLOBS = "log/", "snapshot/", "blobs/"
PROBES = "probe/"
"""Objects by which a server finds out what the place does; removed at once."""
STORE_FILE = "STORE.json"
SCHEMA = 1

Action = Literal["upload", "change", "base", "delete", "removed"]


class LogFile(BaseModel):
    """STORE.json, written once. floor: new names start above it (from a folder store of schema 1)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Literal["log"]
    number: int = Field(alias="schema")
    floor: Annotated[int, Field(ge=0)] = 0

    def file_bytes(self) -> bytes:
        return (self.model_dump_json(by_alias=True) + "\n").encode()


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Deleted(_Stored):
    """A tombstone in the log."""

    highest: Number
    allowed_keys: tuple[str, ...] | None

    @classmethod
    def of(cls, tombstone: Tombstone) -> "Deleted":
        return cls(highest=tombstone.highest, allowed_keys=tombstone.allowed_keys)

    def tombstone(self) -> Tombstone:
        return Tombstone(self.highest, self.allowed_keys)


class Upload(_Stored):
    """Where the two files of a content are: below blobs/DIGEST/id/. size_bytes: of both."""

    id: str
    size_bytes: Annotated[int, Field(ge=0)]


class Entry(_Stored):
    """One change. id: of the attempt, by which its writer knows it again. written: unix seconds, by the writer's clock,
    for people. record: of the name from here on; None if the name is gone, then `deleted` is what stays of it.
    uploads: by digest, contents whose files are elsewhere from here on."""

    number: Number
    id: str
    written: int
    writer: str
    action: Action
    name: str
    record: AdapterRecord | None
    deleted: Deleted | None = None
    uploads: dict[str, Upload] = {}

    def file_bytes(self) -> bytes:
        return (self.model_dump_json() + "\n").encode()


class Snapshot(_Stored):
    """All that the entries up to `number` say together."""

    number: Annotated[int, Field(ge=0)]
    records: list[AdapterRecord]
    deleted: dict[str, Deleted]
    uploads: dict[str, Upload]

    def file_bytes(self) -> bytes:
        return (self.model_dump_json() + "\n").encode()


def entry_key(number: int) -> str:
    return f"{LOG}{number:0{DIGITS}}.json"


def snapshot_key(number: int) -> str:
    return f"{SNAPSHOTS}{number:0{DIGITS}}.json"


def number_of(key: str) -> int | None:
    """The number in a key of an entry or a snapshot; None for another key."""
    digits, dot, rest = key.rpartition("/")[2].partition(".")
    return int(digits) if dot and rest == "json" and len(digits) == DIGITS and digits.isdigit() else None


def blob_key(digest: str, upload: str, file: str) -> str:
    return f"{BLOBS}{digest}/{upload}/{file}"


def new_entry(number: int, attempt: str, writer: str, action: Action, name: str, **made: Any) -> Entry:
    """An entry written now."""
    return Entry(number=number, id=attempt, written=int(time.time()), writer=writer, action=action, name=name, **made)
