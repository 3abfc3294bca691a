"""Owns the files of an adapter: their names, how large each may be, and that there is nothing else in the folder.

Invariant: no file is opened here, and nothing here needs torch.
"""

import stat
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
MAX_CONFIG_BYTES = 64 * 1024
MAX_README_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What the server's operator decides beyond the format."""

    max_weights_bytes: int = 2 * 1024**3
    allow_other_base: bool = False


DEFAULT_LIMITS = Limits()


def size_limits(limits: Limits) -> dict[str, int]:
    """The largest size of each file that an adapter may have, in bytes."""
    return {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: limits.max_weights_bytes, README_FILE: MAX_README_BYTES}


def file_violations(folder: Path, limits: Limits, are_others_allowed: bool = False) -> list[str]:
    """Missing, extra, linked and oversized files. are_others_allowed: extra ones are judged elsewhere (beside.py)."""
    largest = size_limits(limits)
    entries = {entry.name: entry for entry in folder.iterdir()}
    found = [f"{name}: missing" for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in entries]
    for name, entry in sorted(entries.items()):
        if name not in largest:
            if are_others_allowed:
                continue
            found.append(f"{name[:120]}: not part of an adapter (only {', '.join(largest)} are): remove it")
        elif not is_plain_file(entry):
            found.append(f"{name}: found a link, folder or device, expected a plain file")
        elif (size := entry.stat().st_size) > largest[name]:
            found.append(f"{name}: found {size} bytes, expected at most {largest[name]}")
    return found


def is_plain_file(path: Path) -> bool:
    """Whether there is a regular file at `path`; a link to one is not."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
