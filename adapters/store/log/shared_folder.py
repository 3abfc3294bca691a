"""Owns objects in a folder that several machines mount (NFS, CephFS, EFS, ...), or several servers of one machine.

An object is written under another name, synced, and linked to its own: link() fails if that exists, on every machine.
Invariant: an object is whole from the moment it has its name; every call ends, also where the file system hangs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from adapters.store.log.bounded import Alive, BoundedCalls
from adapters.store.log.objects import Found
from perft.durable import sync

UNFINISHED = "unfinished"
"""Where objects are written before they have their names. No object; what a crash left there does no harm."""
FOLDER_MODE, FILE_MODE = 0o770, 0o660
PATIENCE_S = 10.0
BLOCK = 4 * 1024 * 1024
"""Bytes of a file that are copied between two signs of life."""


class SharedFolder:
    """Objects below `root`, which is created with the first of them."""

    def __init__(self, root: Path, patience_s: float = PATIENCE_S) -> None:
        self._root = root.absolute()
        self._calls = BoundedCalls(patience_s, str(self._root))

    def __str__(self) -> str:
        return str(self._root)

    def create(self, key: str, data: bytes) -> bool:
        return self._calls.run(lambda _: self._link(key, lambda file: file.write(data)))

    def get(self, key: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._calls.run(lambda _: (self._root / key).read_bytes())
        return None

    def list(self, prefix: str, after: str = "") -> Iterator[Found]:
        folder = self._root / prefix.rpartition("/")[0]
        yield from self._calls.run(lambda alive: list(self._listed(folder, prefix, after, alive)))

    def put_file(self, key: str, file: Path) -> None:
        def put(alive: Alive) -> bool:
            with file.open("rb") as source:
                return self._link(key, lambda target: _copy(source, target, alive))

        if not self._calls.run(put):
            raise FileExistsError(f"{key} exists, expected a key that was never used")

    def get_file(self, key: str, file: Path) -> None:
        def bring(alive: Alive) -> None:
            with (self._root / key).open("rb") as source, file.open("xb") as target:
                _copy(source, target, alive)

        self._calls.run(bring)

    def remove(self, key: str) -> None:
        self._calls.run(lambda _: self._remove(self._root / key))

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another server was first
            while path.parent.parent != self._root:
                path = path.parent
                path.rmdir()

    def _link(self, key: str, write: Callable[[BinaryIO], object]) -> bool:
        """Give what `write` writes the name `key`; False if that is taken. By the number of its names one knows whether
        a link that was answered with an error was made: NFS may lose an answer."""
        path, unfinished = self._root / key, self._root / UNFINISHED / uuid4().hex
        self._make(unfinished.parent)
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
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
                try:
                    sync(path.parent)
                except OSError as error:
                    raise OSError(f"{key} is there, and could not be synced: {error}") from error
                return True
            raise FileNotFoundError(f"{path.parent} disappears again and again")
        finally:
            unfinished.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(FOLDER_MODE, exist_ok=True)
            sync(path.parent)

    def _listed(self, folder: Path, prefix: str, after: str, alive: Alive) -> Iterator[Found]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name + "/" * entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            alive()
            key = str(Path(entry.path).relative_to(self._root))
            if key == UNFINISHED or not (key.startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/\uffff" > after:
                    yield from self._listed(Path(entry.path), prefix, after, alive)
            elif key > after:
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    yield Found(key, found.st_size, found.st_mtime)


def _copy(source: BinaryIO, target: BinaryIO, alive: Alive) -> None:
    while block := source.read(BLOCK):
        target.write(block)
        alive()
