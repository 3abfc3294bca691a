"""Owns the check of a shared store: every entry, every snapshot, every digest computed again. It changes nothing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapters.errors import StoreError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.identity import canonical_config, content_digest, file_hash, peft_type_of
from adapters.store.log.agreement import SERVERS_FILE, agreed
from adapters.store.log.entries import (
    BLOBS,
    LOG,
    PROBES,
    SNAPSHOTS,
    STORE_FILE,
    Entry,
    Snapshot,
    Upload,
    blob_key,
    entry_key,
    number_of,
)
from adapters.store.log.objects import Objects
from adapters.store.log.state import State
from adapters.store.log.store import read_log_file
from adapters.store.records import VersionRecord, parse

KNOWN = (STORE_FILE, SERVERS_FILE, LOG, SNAPSHOTS, BLOBS, PROBES)


def verify_log(objects: Objects) -> list[str]:
    """One sentence for every problem found in the store at `objects`; empty if it is sound. Raises OSError."""
    try:
        read_log_file(objects)
        agreed(objects)
    except StoreError as error:
        return [str(error)]
    found = [
        f"{each.key}: not part of a store: remove it" for each in objects.list("") if not each.key.startswith(KNOWN)
    ]
    state, problems = _state(objects)
    return found + problems + list(_contents(objects, state))


def _state(objects: Objects) -> tuple[State, list[str]]:
    """What the log says, and what is wrong with it and with the snapshots."""
    state, problems = State(), []
    snapshots = {number_of(found.key): found.key for found in objects.list(SNAPSHOTS)}
    for key in [found.key for found in objects.list(LOG)]:
        expected = entry_key(state.position + 1)
        if key != expected:
            problems.append(f"{key}: found after entry {state.position}, expected {expected}")
            break
        try:
            state.apply(parse(Entry, objects.get(key) or b""))
        except ValueError as error:
            problems.append(f"{key}: {error}")
            break
        if (snapshot := snapshots.get(state.position)) is not None:
            problems += _snapshot_problems(objects, snapshot, state)
    return state, problems


def _snapshot_problems(objects: Objects, key: str, state: State) -> Iterator[str]:
    try:
        if parse(Snapshot, objects.get(key) or b"") != state.snapshot():
            yield f"{key}: does not say what the log says: remove it"
    except ValueError as error:
        yield f"{key}: {error}: remove it"


def _contents(objects: Objects, state: State) -> Iterator[str]:
    users: dict[str, list[tuple[str, VersionRecord]]] = {}
    for record in state.records.values():
        for version in record.versions:
            users.setdefault(version.digest, []).append((f"{record.name}@{version.version}", version))
    for digest, versions in sorted(users.items()):
        upload, names = state.uploads.get(digest), ", ".join(name for name, _ in versions)
        if upload is None:
            yield f"{BLOBS}{digest} ({names}): no entry says where its files are"
            continue
        for problem in _content_problems(objects, digest, upload, versions):
            yield f"{BLOBS}{digest} ({names}): {problem}"


def _content_problems(
    objects: Objects, digest: str, upload: Upload, versions: list[tuple[str, VersionRecord]]
) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        config, weights = Path(name) / CONFIG_FILE, Path(name) / WEIGHTS_FILE
        try:
            for file in (config, weights):
                objects.get_file(blob_key(digest, upload.id, file.name), file)
        except FileNotFoundError:
            yield "its files are missing"
            return
        raw = config.read_bytes()
        if (computed := content_digest(raw, file_hash(weights))) != digest:
            yield f"the files' digest is {computed}"
        for user, version in versions:
            if version.weights_bytes != weights.stat().st_size:
                yield f"{user}: found {weights.stat().st_size} bytes of weights, expected {version.weights_bytes}"
            if peft_type_of(raw) != version.kind or canonical_config(version.config.encode()) != canonical_config(raw):
                yield f"{user}: the record's configuration is not that of the files"
