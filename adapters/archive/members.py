"""Owns which members an archive of an adapter may have, and how their bytes reach the disk.

Invariant: a member's name never becomes part of a path (the one of three known names that it equals does), and every
file is created anew, without following a link.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from adapters.archive.inflate import DamagedArchiveError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, Limits, size_limits
from adapters.format.strict_json import on_one_line

MAX_MEMBERS = 64
_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CLOCK\$|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])\s*([.:].*)?", re.IGNORECASE)


class AdapterTooLargeError(ValueError):
    """The weights in an archive are over the limit; nothing more of it is read."""


class Members:
    """The members of one archive, unpacked into the folder `into`, and every violation found in them."""

    def __init__(self, into: Path, max_weights_bytes: int) -> None:
        self.violations: list[str] = []
        self.limits = size_limits(Limits(max_weights_bytes))
        self._into = into
        self._seen: set[str] = set()

    def refuse(self, name: str, problem: str) -> None:
        """Note a violation about the member `name`."""
        self.violations.append(on_one_line(f"{name[:120]}: {problem}"))

    def admit(self, name: str, kind: str, size: int) -> str | None:
        """The file to write for a member of that name, kind and declared size in bytes; None if there is none.

        Raises AdapterTooLargeError for weights over the limit.
        """
        own = name.removeprefix("./")
        if kind == "folder" and name in (".", "./"):
            return None
        folded = unicodedata.normalize("NFKC", own).casefold()
        if folded in self._seen:
            self.refuse(name, "duplicate member: keep one of them (names that differ only in case count as equal)")
            return None
        self._seen.add(folded)
        if problem := _name_problem(own, self.limits):
            self.refuse(name, problem)
        if kind != "file":
            self.refuse(name, f"found a {kind}, expected a plain file")
        if problem or kind != "file":
            return None
        return own if self._fits(own, size) else None

    def _fits(self, own: str, size: int) -> bool:
        limit = self.limits[own]
        if size > limit and own == WEIGHTS_FILE:
            raise AdapterTooLargeError(f"{own}: unpacks to {size} bytes, expected at most {limit}")
        if not 0 <= size <= limit:
            self.refuse(own, f"found {size} bytes, expected at most {limit}")
        return 0 <= size <= limit

    def write(self, own: str, blocks: Iterable[bytes], size: int) -> None:
        """Write the file `own`, a name from `admit`. Raises DamagedArchiveError for more or fewer bytes than `size`."""
        written = 0
        descriptor = os.open(self._into / own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for block in blocks:
                written += len(block)
                if written > size:
                    raise DamagedArchiveError(f"{own}: unpacks to more than the {size} bytes it declares")
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
        if written != size:
            raise DamagedArchiveError(f"{own}: unpacks to {written} bytes and declares {size}")

    def note_missing(self) -> None:
        """Note which of the two required files are missing."""
        for own in (CONFIG_FILE, WEIGHTS_FILE):
            if own not in self._seen:
                self.violations.append(f"{own}: missing at the root of the archive")


def _name_problem(name: str, allowed: Iterable[str]) -> str | None:
    """What is wrong with a member's name, or None."""
    if name in allowed:
        return None
    if not name:
        return "found a member without a name: remove it"
    if "\0" in name or not name.isprintable():
        return "found a name with characters that do not print: rename it"
    if name.startswith(("/", "\\")):
        return "an absolute path; the files belong at the root of the archive"
    if _DRIVE.match(name):
        return "a path with a Windows drive; the files belong at the root of the archive"
    if ".." in re.split(r"[/\\]", name):
        return "a path that leaves the archive ('..'); the files belong at its root"
    if any(_DEVICE.fullmatch(part) for part in re.split(r"[/\\]", name)):
        return "a device's name on Windows"
    if "\\" in name:
        return "a backslash in a name; the files belong at the root of the archive"
    if "/" in name:
        return "lies in a folder; the files belong at the root of the archive"
    return f"not part of an adapter (only {', '.join(allowed)} are): remove it"
