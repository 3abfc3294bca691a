"""Owns which members an archive of an adapter may have, and how their bytes reach the disk.

Every member's name and kind are judged, also of those that are then ignored.

Invariant: a member's name never becomes part of a path (the one of two known names that it ends in does), and every
file is created anew, without following a link.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from adapters.archive.inflate import DamagedArchiveError
from adapters.format.beside import MAX_NOTES, folded, ignored_notes, is_systems, weights_problem
from adapters.format.files import CONFIG_FILE, README_FILE, WEIGHTS_FILE, Limits, size_limits
from perft.reading import printable

MAX_MEMBERS = 1024
MAX_NAME_CHARACTERS = 1024
IGNORED_FACTOR = 4
"""Ignored members may have so many times the largest weights: Adam's states in float32 beside bfloat16 weights."""

_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CLOCK\$|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])\s*([.:].*)?", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar", ".7z", ".rar")
_REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)


class AdapterTooLargeError(ValueError):
    """The weights in an archive are over the limit; nothing more of it is read."""


class Members:
    """The members of one archive, unpacked into the folder `into`, and every violation found in them."""

    def __init__(self, into: Path, max_weights_bytes: int) -> None:
        self.violations: list[str] = []
        self.limits = size_limits(Limits(max_weights_bytes))
        self.max_ignored_bytes = IGNORED_FACTOR * max_weights_bytes
        self._into = into
        self._seen: dict[str, str] = {}
        self._folders: dict[str, list[str]] = {name: [] for name in _REQUIRED}
        self._ignored: dict[str, int] = {}
        self._ignored_bytes = 0

    def refuse(self, name: str, problem: str) -> None:
        """Note a violation about the member `name`."""
        self.violations.append(printable(f"{name[:120]}: {problem}"))

    def admit(self, name: str, kind: str, size: int) -> str | None:
        """The file to write for a member of that name, kind and declared size in bytes; None if there is none.

        Raises AdapterTooLargeError for weights over the limit, DamagedArchiveError for too many bytes beside them.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        path, own = "/".join(parts), parts[-1] if parts else ""
        if kind == "folder" and name and not path and not name.startswith("/"):
            return None  # the archive's root
        same = "/".join(map(folded, parts))
        if kind == self._seen.get(same) == "folder":
            return None
        if same in self._seen:
            self.refuse(name, "duplicate member: keep one of them (names that differ only in case count as equal)")
            return None
        self._seen[same] = kind
        problem = _path_problem(name.removeprefix("./")) or _name_problem(own, is_systems(path))
        if problem:
            self.refuse(name, problem)
        if kind != "file" and (kind != "folder" or folded(own) in _REQUIRED):
            self.refuse(name, f"found a {kind}, expected a plain file")
        elif kind == "folder" and size:
            self.refuse(name, f"found a folder of {size} bytes, expected an empty entry")
        elif kind == "file" and not problem:
            return self._placed(path, own, size)
        return None

    def _placed(self, path: str, own: str, size: int) -> str | None:
        """The file to write for a sound member, which is kept or ignored."""
        if own not in _REQUIRED or is_systems(path):
            self._ignore(path, size)
            return None
        self._folders[own].append(path.removesuffix(own))
        return own if self._fits(own, size) and len(self._folders[own]) == 1 else None

    def _ignore(self, path: str, size: int) -> None:
        self._ignored[path] = size
        self._ignored_bytes += size
        if self._ignored_bytes > self.max_ignored_bytes:
            largest = max(self._ignored, key=lambda name: self._ignored[name])
            raise DamagedArchiveError(
                f"what is not part of an adapter unpacks to more than {self.max_ignored_bytes} bytes, the most that is "
                f"skipped: leave such files out, first {largest[:120]} ({self._ignored[largest]} bytes)"
            )

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

    def finish(self) -> list[str]:
        """Judge the members as a whole; returns a note for what was ignored."""
        for path in self._ignored:
            problem = None if is_systems(path) else weights_problem(path, bool(self._folders[WEIGHTS_FILE]))
            if problem:
                self.refuse(path, problem)
        for own, folders in self._folders.items():
            if not folders:
                self.violations.append(printable(f"{own}: missing in the archive{self._instead(own)}"))
            elif len(folders) > 1:
                self.refuse(own, f"found {_places(folders)}: keep one adapter in the archive")
        config, weights = (self._folders[own] for own in _REQUIRED)
        if len(config) == len(weights) == 1 and config != weights:
            self.refuse(
                CONFIG_FILE, f"lies {_places(config)} and {WEIGHTS_FILE} {_places(weights)}: put both into one folder"
            )
        within = config[0] if config else ""
        if (size := self._ignored.get(within + README_FILE, 0)) > self.limits[README_FILE]:
            self.refuse(README_FILE, f"found {size} bytes, expected at most {self.limits[README_FILE]}")
        return ignored_notes(self._ignored, within)

    def _instead(self, own: str) -> str:
        """What the archive has in place of a required file, to follow the word that it is missing."""
        others = [name for name in self._ignored if not is_systems(name)]
        if inner := next((name for name in others if name.casefold().endswith(_ARCHIVES)), None):
            return f"; found the archive {inner[:120]} in it: send that one, or the files themselves"
        if not others:
            return ""
        return f"; found {', '.join(name[:120] for name in others[:MAX_NOTES])}{', ...' * (len(others) > MAX_NOTES)}"


def _places(folders: list[str]) -> str:
    return " and ".join(f"in {folder[:120]}" if folder else "at the root" for folder in folders[:MAX_NOTES])


def _path_problem(name: str) -> str | None:
    """What is wrong with the path of a member, or None."""
    if not name:
        return "found a member without a name: remove it"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"found a name of {len(name)} characters, expected at most {MAX_NAME_CHARACTERS}"
    if "\0" in name or not name.isprintable():
        return "found a name with characters that do not print: rename it"
    if name.startswith(("/", "\\")):
        return "an absolute path; expected one inside the archive"
    if _DRIVE.match(name):
        return "a path with a Windows drive; expected one inside the archive"
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        return "a path that leaves the archive ('..')"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "a device's name on Windows"
    return "a backslash in a name; expected '/' between folders: pack the files anew" if "\\" in name else None


def _name_problem(own: str, is_ignored: bool) -> str | None:
    """What is wrong with a name that is almost one of an adapter's files, or None."""
    if own in _REQUIRED or is_ignored:
        return None
    name, colon, _ = own.partition(":")
    if folded(name) not in _REQUIRED:
        return None
    if colon:
        return f"a stream of {folded(name)} on Windows: remove it"
    return f"almost the name of an adapter's file, which is {folded(own)}: rename it"
