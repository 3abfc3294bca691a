"""Owns how much memory this process may use, from which default sizes are derived."""

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")
"""Of cgroup version 2 and version 1."""


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """The machine's memory in bytes or, if that is less, the container's limit."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in LIMIT_FILES:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int((cgroup / file).read_text()))
    return min(sizes)
