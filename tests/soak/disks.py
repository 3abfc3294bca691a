"""Disks that fail: a small one that fills up, one that becomes read-only.

A real file system in memory where this process may mount one; else the server's own disk is told to fail (`faults`
of `tests.soak.zygote`), which stops the store alone.
"""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SmallDisk:
    """root: where it is. is_real: whether it is a file system of its own. faults: what a server is to be told."""

    root: Path
    is_real: bool
    faults: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def _ballast(self) -> Path:
        return self.root / "ballast"

    def fill(self) -> None:
        """No byte is left."""
        if not self.is_real:
            self.faults.write_text(str(errno.ENOSPC))
            return
        with self._ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        """What `fill` took is given back."""
        self._ballast.unlink(missing_ok=True)
        self.faults.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """The store cannot be changed meanwhile, by nobody who opens a path in it."""
        if not self.is_real:
            self.faults.write_text(str(errno.EROFS))
            yield
            self.faults.unlink()
            return
        _run("mount", "--bind", self.store, self.store)
        try:
            _run("mount", "-o", "remount,ro,bind", self.store)
            yield
        finally:
            _run("umount", self.store)


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[SmallDisk]:
    """An empty disk in an empty folder; whoever uses it has stopped at the end."""
    root = folder / "disk"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], capture_output=True, check=False
    )
    is_real = mounted.returncode == 0
    try:
        yield SmallDisk(root, is_real, folder / "faults")
    finally:
        if is_real:
            _run("umount", root)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
