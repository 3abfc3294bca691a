"""Owns how much memory this process may use, from which default sizes follow."""

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")
"""Of version 2 and of version 1."""


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """The machine's memory or, where that is less, what the container has of it."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in LIMIT_FILES:
        with suppress(OSError, ValueError):  # none, or "max"
            sizes.append(int((cgroup / file).read_text()))
    return min(sizes)
