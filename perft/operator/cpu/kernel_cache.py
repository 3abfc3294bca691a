"""Owns the folder in which compiled CPU kernels are kept from one start to the next.

Invariant: kernels are loaded only from a folder that belongs to this user and that nobody else can write.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numba

FOLDER_VARIABLE = "NUMBA_CACHE_DIR"


def kernel_folder() -> Path:
    """Where kernels are kept: NUMBA_CACHE_DIR, else ~/.cache/perft/kernels, else (no home to write to) a new folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    with suppress(RuntimeError):  # no home
        own = Path("~/.cache/perft/kernels").expanduser()
        if is_private(own):
            return own
    return Path(tempfile.mkdtemp(prefix="perft-kernels-"))


def is_private(folder: Path) -> bool:
    """Whether `folder` can be made or is there, is this user's, and can be written by nobody else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@contextmanager
def kernels_kept() -> Iterator[None]:
    """Functions that Numba wraps meanwhile are kept in `kernel_folder`; its setting for others is left as it is."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(kernel_folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
