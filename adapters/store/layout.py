"""Owns where things lie in a store's folder, and when a blob is whole. It reads and changes nothing else.

STORE.json                        the schema's number and the floor of new names
lock, secret                      the lock file (store_lock); 32 random bytes of the server
names/<sha256 of the name>.json   one AdapterRecord
blobs/<digest>/                   the two files of an adapter
staging/, trash/                  on the way in, on the way out; emptied by `open`
"""

import stat
from dataclasses import dataclass
from pathlib import Path

from adapters.format.folder import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.durable import TEMPORARY
from adapters.store.records import VersionRecord, record_file

FOLDERS = ("blobs", "names", "staging", "trash")
FILES = ("STORE.json", "lock", "secret")
FOREIGN = ("lost+found",)
"""What a file system's own root has: a store may lie at a mount point."""


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
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    def blob(self, digest: str) -> Path:
        return self.blobs / digest

    def record(self, name: str) -> Path:
        return self.names / record_file(name)

    def unknown(self) -> list[str]:
        """What lies at the root and is no part of a store."""
        known = {*FOLDERS, *FILES, *FOREIGN, *(name + TEMPORARY for name in FILES)}
        return sorted(path.name for path in self.root.iterdir() if path.name not in known)


def blob_problem(folder: Path) -> str | None:
    """Why the blob in `folder` is not whole, as far as its files' names and kinds tell."""
    if not folder.is_dir() or folder.is_symlink():
        return "missing"
    found = {path.name: path.lstat().st_mode for path in folder.iterdir()}
    if found.keys() != {CONFIG_FILE, WEIGHTS_FILE} or not all(stat.S_ISREG(mode) for mode in found.values()):
        return f"found {', '.join(sorted(found)) or 'nothing'}, expected the files {CONFIG_FILE} and {WEIGHTS_FILE}"
    return None


def size_problem(folder: Path, version: VersionRecord) -> str | None:
    """Why a whole blob is not of the size that `version` remembers."""
    found = (folder / WEIGHTS_FILE).stat().st_size
    if found == version.weights_bytes:
        return None
    return f"{WEIGHTS_FILE} has {found} bytes, expected {version.weights_bytes}"


def blob_bytes(folder: Path) -> int:
    """The size of both files of a whole blob."""
    return (folder / CONFIG_FILE).stat().st_size + (folder / WEIGHTS_FILE).stat().st_size
