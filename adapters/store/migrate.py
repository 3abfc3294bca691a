"""Owns moving a store: from the folder of one server to an address that many share, and back.

Names, versions and their numbers, rights, pins and what is remembered of deleted names stay as they are.
Invariant: what is made is no store until all of it is there; the source is not changed.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from adapters.errors import StoreUnusableError, store_errors
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.address import is_shared, objects_at
from adapters.store.folder.deleted import DeletedNames, read_deleted
from adapters.store.folder.durable import Disk
from adapters.store.folder.layout import Layout
from adapters.store.folder.opening import SCHEMA as FOLDER_SCHEMA
from adapters.store.folder.opening import read_store_file
from adapters.store.folder.store import FolderStore
from adapters.store.log.entries import SCHEMA, STORE_FILE, Deleted, LogFile, Upload, blob_key, entry_key, new_entry
from adapters.store.log.objects import Objects
from adapters.store.log.store import OF_A_SHARED_PLACE, LogStore, read_log_file
from adapters.store.records import StoreFile

FILES = (CONFIG_FILE, WEIGHTS_FILE)


def migrate(source: str, target: str, scratch: Path, say: Callable[[str], None]) -> int:
    """Copy the store `source` to `target`, where there is nothing yet; one of them is a folder, the other an address.

    scratch: an empty folder for what is downloaded. Returns the number of names. Raises StoreError.
    """
    if is_shared(source) == is_shared(target):
        raise StoreUnusableError(
            f"found {source} and {target}, expected the folder of one server and an address (file://, s3://, ...)"
        )
    return _to_log(Path(source), target, say) if is_shared(target) else _to_folder(source, Path(target), scratch, say)


def _to_log(folder: Path, address: str, say: Callable[[str], None]) -> int:
    layout, objects = Layout(folder.absolute()), objects_at(address)
    if not layout.store_file.is_file():
        raise StoreUnusableError(f"{folder}: found no STORE.json, expected the store of a server")
    with store_errors(address, "migrating", OF_A_SHARED_PLACE), _opened(folder) as store:
        if next(objects.list(""), None) is not None:
            raise StoreUnusableError(f"{address}: found objects, expected nothing: give another prefix, or empty it")
        number, uploads = 0, dict[str, Upload]()
        for record in store.adapters():
            say(f"{record.name}: {len(record.versions)} versions")
            for version in record.versions:
                if version.digest not in uploads:
                    uploads[version.digest] = _upload(objects, store, version.digest)
            number += 1
            own = {version.digest: uploads[version.digest] for version in record.versions}
            _append(objects, number, record.name, record=record, uploads=own)
        for path in sorted(layout.deleted.glob("*.json")):
            for name, entry in read_deleted(path.read_bytes()).items():
                if store.get(name) is None:
                    number += 1
                    keys = None if entry.keys is None else tuple(entry.keys)
                    deleted = Deleted(highest=entry.highest, allowed_keys=keys)
                    _append(objects, number, name, record=None, deleted=deleted)
        floor = read_store_file(layout).floor
        objects.create(STORE_FILE, LogFile(kind="log", schema=SCHEMA, floor=floor).file_bytes())
        return len(store.adapters())


def _upload(objects: Objects, store: FolderStore, digest: str) -> Upload:
    if (problem := store.problem(digest)) is not None:
        raise StoreUnusableError(f"blobs/{digest}: {problem}: delete its versions, or upload the adapter again, first")
    upload, size = uuid4().hex, 0
    for file in FILES:
        path = store.folder(digest) / file
        objects.put_file(blob_key(digest, upload, file), path)
        size += path.stat().st_size
    return Upload(id=upload, size_bytes=size)


def _append(objects: Objects, number: int, name: str, **made: object) -> None:
    entry = new_entry(number, uuid4().hex, "migration", "upload", name, **made)
    if not objects.create(entry_key(number), entry.file_bytes()):
        raise StoreUnusableError(f"{objects}: another process writes there")


def _to_folder(address: str, folder: Path, scratch: Path, say: Callable[[str], None]) -> int:
    objects, target = objects_at(address), folder.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreUnusableError(f"{folder}: found something there, expected an empty folder or nothing")
    unfinished = target.with_name(f".{target.name}.migrating-{uuid4().hex[:8]}")
    with store_errors(target, "migrating"):
        floor = read_log_file(objects).floor
        store = LogStore.open(objects, scratch)
        try:
            FolderStore.open(unfinished).close()
            _fill(Layout(unfinished), store, floor, say)
            if target.exists():
                target.rmdir()
            os.rename(unfinished, target)
            return len(store.adapters())
        finally:
            store.close()
            shutil.rmtree(unfinished, ignore_errors=True)


def _fill(layout: Layout, store: LogStore, floor: int, say: Callable[[str], None]) -> None:
    disk, deleted = Disk(), DeletedNames(layout, Disk())
    disk.write(layout.store_file, StoreFile(schema=FOLDER_SCHEMA, floor=floor).file_bytes())
    for name, tombstone in store.deleted().items():
        deleted.put(name, tombstone)
    for record in store.adapters():
        say(f"{record.name}: {len(record.versions)} versions")
        for version in record.versions:
            blob = layout.blob(version.digest)
            if not blob.exists():
                disk.make_folder(blob)
                for file in FILES:
                    shutil.copyfile(store.fetch(version.digest) / file, blob / file)
                    disk.make_private(blob / file)
                    disk.sync_file(blob / file)
                disk.sync_folder(blob)
        disk.write(layout.record(record.name), record.file_bytes())
    disk.sync_folder(layout.blobs)


@contextmanager
def _opened(folder: Path) -> Iterator[FolderStore]:
    store = FolderStore.open(folder)
    try:
        yield store
    finally:
        store.close()
