"""Owns the opening of a store: created or checked, migrated to this schema, cleaned of what a crash left, read.

Invariant: nothing in the folder is changed before it is known to be a store (or empty) and the lock is held.
"""

import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import StoreSchemaError, StoreUnusableError
from adapters.store.folder.durable import TEMPORARY, Disk
from adapters.store.folder.layout import FOLDERS, FOREIGN, Layout, blob_bytes, blob_problem, size_problem
from adapters.store.folder.lock import FolderLock
from adapters.store.records import AdapterRecord, StoreFile, is_digest, parse, read_record

SCHEMA = 2
"""2: a version has its base; deleted names are remembered one by one, in deleted/."""
SECRET_BYTES = 32
MIGRATIONS: dict[int, Callable[[Layout, Disk], None]] = {1: lambda layout, disk: None}
"""By schema number, the migration to the next one. Each must be safe to run again after a crash half-way."""


@dataclass(frozen=True)
class Contents:
    """What an open store holds. blobs: the size of every whole blob in bytes. problems: by digest, why one is not."""

    floor: int
    secret: bytes
    records: dict[str, AdapterRecord]
    blobs: dict[str, int]
    problems: dict[str, str]


def open_folder(layout: Layout, disk: Disk) -> tuple[FolderLock, Contents]:
    """Lock the store and make it ready for changes; returns the lock and what the store holds."""
    _make_root(layout.root, disk)
    _check_is_store(layout)
    lock = FolderLock(layout.lock)
    try:
        _check_is_store(layout)
        _close_to_others(layout.root)
        _make_what_is_missing(layout, disk)
        floor = _to_this_schema(layout, disk)
        records = _read_records(layout)
        _remove_leftovers(layout, disk, {v.digest for record in records.values() for v in record.versions})
        blobs, problems = _measure(layout, records)
        return lock, Contents(floor, _read_secret(layout), records, blobs, problems)
    except BaseException:
        lock.release()
        raise


def read_store_file(layout: Layout) -> StoreFile:
    """STORE.json. Raises StoreSchemaError for an unknown schema, StoreUnusableError if the file is damaged."""
    raw = layout.store_file.read_bytes()
    try:
        values = json.loads(raw)
        if isinstance(values, dict) and values.get("kind") == "log":
            raise StoreUnusableError(
                f"{layout.root} is a store that servers share: name it by its address, file://{layout.root.absolute()}"
            )
        number = values.get("schema") if isinstance(values, dict) else None
        if type(number) is int and (problem := _schema_problem(number)):
            raise StoreSchemaError(f"the store {layout.root}: {problem}")
        return parse(StoreFile, raw)
    except ValueError as error:
        raise StoreUnusableError(
            f"{layout.store_file} is damaged: {error}; restore it from a copy, or write "
            f'{{"schema": {SCHEMA}, "floor": N}} with N at least the highest version number ever given'
        ) from error


def _schema_problem(found: int) -> str | None:
    """Why a store of schema `found` cannot be opened; None if it can."""
    if found <= SCHEMA and all(number in MIGRATIONS for number in range(found, SCHEMA)):
        return None
    other = "a newer" if found > SCHEMA else "an older"
    return f"found schema {found}, expected {SCHEMA}: use {other} version of the server, or start with an empty folder"


def _make_root(root: Path, disk: Disk) -> None:
    missing = [path for path in (root, *root.parents) if not path.exists()]
    for path in reversed(missing):
        disk.make_folder(path)
        disk.sync_folder(path.parent)


def _close_to_others(root: Path) -> None:
    """Take away what a store of an older version gave to every user of the machine: reading the adapters of tenants."""
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & 0o007:
        with suppress(OSError):  # a mount point of another user's
            root.chmod(mode & ~0o007)


def _check_is_store(layout: Layout) -> None:
    """Refuse a folder with other contents, or a store without names/, which would lose its blobs too."""
    if not layout.root.is_dir():
        raise StoreUnusableError(f"{layout.root}: found no folder, expected an empty one or a store")
    if not layout.store_file.exists():
        if (found := _first_foreign(layout)) is not None:
            raise StoreUnusableError(
                f"{layout.root}: found {found} and no STORE.json, expected an empty folder or a store; name another "
                "folder, or restore STORE.json from a copy"
            )
    elif not layout.names.is_dir() and layout.blobs.is_dir() and any(layout.blobs.iterdir()):
        raise StoreUnusableError(f"{layout.names}: missing, while there are blobs; restore it from a copy")


def _first_foreign(layout: Layout) -> str | None:
    """Something that an empty folder, or a store whose creation was interrupted, does not have."""
    if unknown := layout.unknown():
        return unknown[0]
    inside = (path for name in FOLDERS if (layout.root / name).is_dir() for path in (layout.root / name).iterdir())
    return next((f"{path.parent.name}/{path.name}" for path in inside), None)


def _make_what_is_missing(layout: Layout, disk: Disk) -> None:
    """Create the parts of a store; STORE.json comes last, and makes the folder a store."""
    missing = [layout.root / name for name in FOLDERS if not (layout.root / name).exists()]
    for path in missing:
        disk.make_folder(path)
    if missing:
        disk.sync_folder(layout.root)
    if not layout.secret.exists():
        disk.write(layout.secret, secrets.token_bytes(SECRET_BYTES))
    if not layout.store_file.exists():
        disk.write(layout.store_file, StoreFile(schema=SCHEMA, floor=0).file_bytes())


def _to_this_schema(layout: Layout, disk: Disk) -> int:
    """Migrate step by step; returns the floor."""
    store = read_store_file(layout)
    for number in range(store.number, SCHEMA):
        MIGRATIONS[number](layout, disk)
        store = read_store_file(layout).model_copy(update={"number": number + 1})
        disk.write(layout.store_file, store.file_bytes())
    return store.floor


def _read_records(layout: Layout) -> dict[str, AdapterRecord]:
    records: dict[str, AdapterRecord] = {}
    for path in sorted(layout.names.glob("*.json")):
        try:
            record = read_record(path)
        except ValueError as error:
            raise StoreUnusableError(
                f"the record {path} is damaged: {error}; restore it from a copy, or move it out of the store to go on "
                "without that adapter (its blobs are then removed at the next start: copy blobs/ first; and raise "
                '"floor" in STORE.json to at least the highest version number ever given, or numbers are given again)'
            ) from error
        records[record.name] = record
    return records


def _remove_leftovers(layout: Layout, disk: Disk, wanted: set[str]) -> None:
    """Remove the leftovers of changes that a crash interrupted."""
    leftovers = [
        path for folder in (layout.root, layout.names, layout.deleted) for path in folder.glob("*" + TEMPORARY)
    ]
    leftovers += [path for folder in (layout.staging, layout.trash) for path in folder.iterdir()]
    leftovers += [path for path in layout.blobs.iterdir() if is_digest(path.name) and path.name not in wanted]
    for path in leftovers:
        if path.name not in FOREIGN:
            disk.remove_tree(path)


def _measure(layout: Layout, records: dict[str, AdapterRecord]) -> tuple[dict[str, int], dict[str, str]]:
    """The size of every whole blob in bytes, and what is wrong with the others."""
    blobs: dict[str, int] = {}
    problems: dict[str, str] = {}
    for version in (v for record in records.values() for v in record.versions):
        folder = layout.blob(version.digest)
        if problem := blob_problem(folder) or size_problem(folder, version):
            problems[version.digest] = problem
        else:
            blobs[version.digest] = blob_bytes(folder)
    return {digest: size for digest, size in blobs.items() if digest not in problems}, problems


def _read_secret(layout: Layout) -> bytes:
    secret = layout.secret.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise StoreUnusableError(
            f"{layout.secret}: found {len(secret)} bytes, expected {SECRET_BYTES}; remove the file: a new one is made"
        )
    if layout.secret.stat().st_mode & 0o077:
        with suppress(OSError):
            os.chmod(layout.secret, 0o600)
    return secret
