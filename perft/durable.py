"""Owns making what was written survive a power failure. Imports no torch."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sync a file's bytes, or a folder's entries: what was created, renamed or removed there. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
