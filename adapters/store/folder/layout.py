"""Owns the layout of a store's folder, and when a blob is whole. It changes nothing.

STORE.json                        the schema's number and the floor of new names
lock, secret                      the lock file; 32 random bytes of the server
names/<sha256 of the name>.json   one AdapterRecord
deleted/<its first 3 digits>.json the last numbers of deleted names
blobs/<digest>/                   the two files of an adapter
reserve/                          room for changes that a full disk must not stop
staging/, trash/                  uploads under way, blobs being removed; emptied when the store is opened
"""

import stat
from dataclasses import dataclass
from pathlib import Path

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.folder.durable import TEMPORARY
from adapters.store.records import VersionRecord, record_file

FOLDERS = ("blobs", "deleted", "names", "staging", "trash")
FILES = ("STORE.json", "lock", "secret")
RESERVE = "reserve"
FOREIGN = ("lost+found",)
"""What the root of a file system contains: a store may be at a mount point."""


@dataclass(frozen=True)
class Layout:
    """The paths of the store at `root`."""

    root: Path

    @property
    def store_file(self) -> Path:
        return self.root / "STORE.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def names(self) -> Path:
        return self.root / "names"

    @property
    def deleted(self) -> Path:
        return self.root / "deleted"

    @property
    def reserve(self) -> Path:
        return self.root / RESERVE

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    def blob(self, digest: str) -> Path:
        return self.blobs / digest

    def record(self, name: str) -> Path:
        return self.names / record_file(name)

    def deleted_file(self, name: str) -> Path:
        """Where a deleted name is remembered."""
        return self.deleted / f"{record_file(name)[:3]}.json"

    def unknown(self) -> list[str]:
        """What is at the root and not part of a store."""
        known = {*FOLDERS, RESERVE, *FILES, *FOREIGN, *(name + TEMPORARY for name in FILES)}
        return sorted(path.name for path in self.root.iterdir() if path.name not in known)


def blob_problem(folder: Path) -> str | None:
    """Why the blob in `folder` is not whole, judging by the names and kinds of its files."""
    if not folder.is_dir() or folder.is_symlink():
        return "missing"
    found = {path.name: path.lstat().st_mode for path in folder.iterdir()}
    if found.keys() != {CONFIG_FILE, WEIGHTS_FILE} or not all(stat.S_ISREG(mode) for mode in found.values()):
        return f"found {', '.join(sorted(found)) or 'nothing'}, expected the files {CONFIG_FILE} and {WEIGHTS_FILE}"
    return None


def size_problem(folder: Path, version: VersionRecord) -> str | None:
    """Why a whole blob is not of the size that `version` records."""
    found = (folder / WEIGHTS_FILE).stat().st_size
    if found == version.weights_bytes:
        return None
    return f"{WEIGHTS_FILE} has {found} bytes, expected {version.weights_bytes}"


def blob_bytes(folder: Path) -> int:
    """The size of both files of a whole blob, in bytes."""
    return (folder / CONFIG_FILE).stat().st_size + (folder / WEIGHTS_FILE).stat().st_size
