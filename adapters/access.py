"""Owns what this process may do with a path that somebody gave it, and how it is said that it may not.

Invariant: the kernel is asked, with the ids that count when a file is opened; nothing is opened, made or changed.
"""

import errno
import os
from pathlib import Path


def read_problem(path: Path, remedy: str | None = None) -> str | None:
    """Why this process cannot read the file at `path`, or list the folder there; None if it can or nothing is there.

    remedy: a command that mends it, in place of one that lets everybody read.
    """
    *parents, last = _parts(path)
    if (closed := _first_closed(parents)) is not None:
        return _denied(closed, "enter", f"chmod a+x {closed}")
    if not last.exists() or _may(last, os.R_OK | (os.X_OK if last.is_dir() else 0)):
        return None
    return _denied(last, "read", remedy or f"chmod -R a+rX {last}")


def write_problem(folder: Path) -> str | None:
    """Why this process cannot make `folder`, or change what is in it; None if it can, or if a file is in its place."""
    *parents, last = _parts(folder)
    if (closed := _first_closed(parents)) is not None:
        return _denied(closed, "enter", f"chmod a+x {closed}")
    nearest = next(path for path in (last, *reversed(parents)) if path.exists())
    if not nearest.is_dir() or _may(nearest, os.R_OK | os.W_OK | os.X_OK):
        return None
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"{folder}: found a read-only file system there, expected one to write to: mount a volume there"
    make = f"mkdir -p {last} && " if nearest != last else ""
    return _denied(nearest, "write to", f"{make}chown -R {os.geteuid()} {last}")


def home_problem() -> str | None:
    """Why this process has no home folder, where stores, compiled kernels and downloads go; None if it has one."""
    try:
        Path.home()
    except RuntimeError:
        user = os.geteuid()
        return f"HOME: found none, and no home of user {user} in /etc/passwd, expected a folder that it may write to"
    return None


def check_readable(path: Path, remedy: str | None = None) -> None:
    """Raises PermissionError, whose text says what to do, for what this process cannot read."""
    if (problem := read_problem(path, remedy)) is not None:
        raise PermissionError(errno.EACCES, problem)


def explained(error: PermissionError) -> str:
    """What the system, or `check_readable`, denied, and what to do."""
    if not isinstance(error.filename, str):
        return error.strerror or str(error)
    path = Path(error.filename)
    return read_problem(path) or write_problem(path.parent) or str(error)


def _parts(path: Path) -> list[Path]:
    """The folders on the way to `path`, the root first, and `path` itself, without links as far as they can be read."""
    real = Path(os.path.realpath(path))
    return [*reversed(real.parents), real]


def _first_closed(folders: list[Path]) -> Path | None:
    """The first folder that this process may not enter; None if the way ends before one."""
    for folder in folders:
        if not folder.is_dir():
            return None
        if not _may(folder, os.X_OK):
            return folder
    return None


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=True)


def _denied(path: Path, wanted: str, remedy: str) -> str:
    found, user = path.stat(), os.geteuid()
    what, owner = "folder" if path.is_dir() else "file", found.st_uid
    as_owner = f", or start as user {owner} (a container: --user {owner})" if owner not in (0, user) else ""
    return (
        f"{path}: found a {what} of user {owner} with mode {found.st_mode & 0o7777:o}, expected one that this process, "
        f"user {user}, may {wanted}: run `{remedy}` (on the host, if it is mounted){as_owner}"
    )
