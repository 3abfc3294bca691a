"""Owns the files that hold keys.

Invariant: a file that other users can read, or that anyone but its owner can write, is rejected. Its group may read it,
because Kubernetes mounts secrets so for a pod's fsGroup.
"""

import os
import stat
from pathlib import Path

from adapters.access import read_problem
from server.auth.keys import KeyProblems, key_problem, labelled_keys

SECRET_FILE = "chmod 600, or 640 where its group may read it"
"""The mode expected of such a file, as the documentation says it."""
_TOO_OPEN = stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH


def read_api_keys(path: Path) -> list[tuple[str, str]]:
    """(label, key) of every line LABEL=KEY; empty lines and lines that begin with # are skipped. Raises ValueError."""
    lines = enumerate(read_secret(path).splitlines(), start=1)
    items = [(f"{path}, line {number}", line.strip()) for number, line in lines]
    found = labelled_keys((where, line) for where, line in items if line and not line.startswith("#"))
    if not found:
        raise ValueError(f"{path}: found no key, expected one LABEL=KEY per line")
    return found


def read_admin_key(path: Path) -> str:
    """The file's one line. Raises ValueError."""
    key = read_secret(path).strip()
    if problem := key_problem(key):
        raise KeyProblems([f"{path}: {problem}"])
    return key


def read_secret(path: Path) -> str:
    """The text of a file with secrets. Raises ValueError if it cannot be read, or if its mode is too open."""
    if problem := file_problem(path):
        raise ValueError(problem)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None


def file_problem(path: Path) -> str | None:
    """Why a file cannot hold secrets; None if it can."""
    if problem := read_problem(path, f"chown {os.geteuid()} {path}"):
        return problem
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path}: found no readable file ({error.strerror})"
    if not stat.S_ISREG(mode):
        return f"{path}: found no regular file, expected one"
    if mode & _TOO_OPEN:
        return (
            f"{path}: found a file of mode {stat.S_IMODE(mode):o}, expected one that other users cannot read and only "
            "its owner can write; run chmod 600"
        )
    return None
