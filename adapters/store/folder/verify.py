"""Owns the offline check of a store: every record, every blob, every digest computed again. It changes nothing.

It takes no lock. Leftovers of a crash that the next opening removes (staging/, trash/, temporary files, blobs that no
record names) are not reported.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from adapters.errors import StoreError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.identity import canonical_config, digest_of, file_hash, peft_type_of
from adapters.store.folder.deleted import read_deleted
from adapters.store.folder.durable import TEMPORARY
from adapters.store.folder.layout import FOREIGN, Layout, blob_problem, size_problem
from adapters.store.folder.opening import SECRET_BYTES, read_store_file
from adapters.store.records import AdapterRecord, VersionRecord, is_digest, read_record

ATTEMPTS = 5
"""A server may change the store during the check: problems count only if nothing changed meanwhile."""


def verify_folder(folder: Path) -> list[str]:
    """One sentence for every problem found in the store at `folder`; empty if it is sound."""
    layout = Layout(folder)
    for _ in range(ATTEMPTS):
        before = _state(layout)
        found = _problems(layout)
        if not found or _state(layout) == before:
            return found
    return found


def _problems(layout: Layout) -> list[str]:
    if not layout.store_file.exists():
        return [f"{layout.root}: not a store: STORE.json is missing"]
    try:
        read_store_file(layout)
    except (StoreError, OSError) as error:
        return [str(error)]
    found = [f"{name}: not part of a store: remove it" for name in layout.unknown()]
    found += [f"{path.name}/: missing" for path in (layout.names, layout.blobs) if not path.is_dir()]
    found += _checked("secret", partial(_secret_problems, layout.secret))
    records, record_problems = _read_names(layout)
    found += record_problems + _deleted_problems(layout)
    return found + _blob_folder_problems(layout) + _content_problems(layout, records)


def _secret_problems(path: Path) -> Iterable[str]:
    status = path.stat()
    if status.st_size != SECRET_BYTES:
        yield f"found {status.st_size} bytes, expected {SECRET_BYTES}"
    if status.st_mode & 0o077:
        yield f"found mode {status.st_mode & 0o777:o}, expected 600: others can read it"


def _read_names(layout: Layout) -> tuple[list[AdapterRecord], list[str]]:
    records: list[AdapterRecord] = []
    found: list[str] = []
    for path in _entries(layout.names):
        if path.suffix != ".json":
            found.append(f"names/{path.name}: not part of a store: remove it")
            continue
        try:
            records.append(read_record(path))
        except (ValueError, OSError) as error:
            found.append(f"names/{path.name}: {error}")
    return records, found


def _deleted_problems(layout: Layout) -> list[str]:
    """What is wrong with the files of deleted names. A store of schema 1 has none."""
    found: list[str] = []
    for path in _entries(layout.deleted):
        try:
            misplaced = [name for name in read_deleted(path.read_bytes()) if layout.deleted_file(name) != path]
        except (ValueError, OSError) as error:
            found.append(f"deleted/{path.name}: {error}")
        else:
            found += [f"deleted/{path.name}: found the name {name!r}, which is in another file" for name in misplaced]
    return found


def _blob_folder_problems(layout: Layout) -> list[str]:
    unknown = [path.name for path in _entries(layout.blobs) if not is_digest(path.name)]
    return [f"blobs/{name}: not part of a store: remove it" for name in unknown]


def _content_problems(layout: Layout, records: list[AdapterRecord]) -> list[str]:
    """What is wrong with the blobs that the records name."""
    users: dict[str, list[tuple[str, VersionRecord]]] = defaultdict(list)
    for record in records:
        for version in record.versions:
            users[version.digest].append((f"{record.name}@{version.version}", version))
    found: list[str] = []
    for digest, versions in sorted(users.items()):
        check = partial(_blob_problems, layout.blob(digest), digest, versions)
        found += _checked(f"blobs/{digest} ({', '.join(name for name, _ in versions)})", check)
    return found


def _blob_problems(blob: Path, digest: str, users: list[tuple[str, VersionRecord]]) -> Iterable[str]:
    if problem := blob_problem(blob):
        yield problem
        return
    raw = (blob / CONFIG_FILE).read_bytes()
    meaning = canonical_config(raw)
    if meaning is None:
        yield f"{CONFIG_FILE} is not a valid configuration"
    elif (computed := digest_of(meaning, file_hash(blob / WEIGHTS_FILE))) != digest:
        yield f"the files' digest is {computed}"
    for name, version in users:
        if problem := size_problem(blob, version):
            yield f"{name}: {problem}"
        if peft_type_of(raw) != version.kind or canonical_config(version.config.encode()) != meaning:
            yield f"{name}: the record's configuration is not that of the blob"


def _checked(where: str, check: Callable[[], Iterable[str]]) -> list[str]:
    """The problems that `check` finds `where`; a file that cannot be read is one."""
    found: list[str] = []
    try:
        for problem in check():
            found.append(f"{where}: {problem}")
    except OSError as error:
        found.append(f"{where}: cannot be read: {error}")
    return found


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix != TEMPORARY and path.name not in FOREIGN)


def _state(layout: Layout) -> dict[str, bytes]:
    """What a running server changes: the records' bytes and the names of the blobs."""
    state = {path.name: b"" for path in _entries(layout.blobs)}
    for path in [*_entries(layout.names), *_entries(layout.deleted)]:
        try:
            state[path.name] = path.read_bytes()
        except OSError as error:
            state[path.name] = str(error).encode()
    return state
