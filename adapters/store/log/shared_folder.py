"""Owns objects in a folder that several machines mount (NFS, CephFS, EFS, ...), or several servers of one machine.

An object is written under another name, synced, and linked to its own: link() fails if that exists, on every machine.
Invariant: an object is whole from the moment it has its name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from adapters.store.log.objects import Found

UNFINISHED = "unfinished"
"""Where objects are written before they have their names. No object; what a crash left there does no harm."""
FOLDER_MODE, FILE_MODE = 0o770, 0o660


class SharedFolder:
    """Objects below `root`, which is created with the first of them."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def __str__(self) -> str:
        return str(self._root)

    def create(self, key: str, data: bytes) -> bool:
        def write(path: Path) -> None:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        return self._link(key, write)

    def get(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            return None

    def list(self, prefix: str, after: str = "") -> Iterator[Found]:
        folder = self._root / prefix.rpartition("/")[0]
        yield from self._listed(folder, prefix, after)

    def put_file(self, key: str, file: Path) -> None:
        def copy(path: Path) -> None:
            shutil.copyfile(file, path)
            path.chmod(FILE_MODE)
            _sync(path)

        if not self._link(key, copy):
            raise FileExistsError(f"{key} exists, expected a key that was never used")

    def get_file(self, key: str, file: Path) -> None:
        shutil.copyfile(self._root / key, file)

    def remove(self, key: str) -> None:
        path = self._root / key
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another server was first
            while path.parent.parent != self._root:
                path = path.parent
                path.rmdir()

    def _link(self, key: str, write: Callable[[Path], None]) -> bool:
        """Give what `write` writes the name `key`; False if that is taken. By the number of its names one knows whether
        a link that was answered with an error was made: NFS may lose an answer."""
        path, unfinished = self._root / key, self._root / UNFINISHED / uuid4().hex
        self._make(unfinished.parent)
        try:
            write(unfinished)
            for _ in range(2):
                self._make(path.parent)
                try:
                    os.link(unfinished, path)
                except FileNotFoundError:  # `remove` took the empty folder away
                    continue
                except OSError as error:
                    if os.stat(unfinished).st_nlink < 2:
                        if isinstance(error, FileExistsError):
                            return False
                        raise
                _sync(path.parent)
                return True
            raise FileNotFoundError(f"{path.parent} disappears again and again")
        finally:
            unfinished.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(FOLDER_MODE, exist_ok=True)
            _sync(path.parent)

    def _listed(self, folder: Path, prefix: str, after: str) -> Iterator[Found]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name + "/" * entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = str(Path(entry.path).relative_to(self._root))
            if key == UNFINISHED or not (key.startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/\uffff" > after:
                    yield from self._listed(Path(entry.path), prefix, after)
            elif key > after:
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    yield Found(key, found.st_size, found.st_mtime)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
