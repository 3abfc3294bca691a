"""Owns the file that results are written to: that it can be written is known before the first question is asked.

Invariant: the file is complete or as it was, and what an evaluation reads is never replaced.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.reading import check_plain


class Output:
    """A file for results. inputs: files and folders that are read. Raises InputError if it cannot be written."""

    def __init__(self, path: Path, inputs: Sequence[Path] = (), overwrite: bool = False) -> None:
        self._path = Path(os.path.realpath(path))
        try:
            if self._path.exists():
                self._check_existing(path, inputs, overwrite)
            with self._unfinished():
                pass
        except OSError as error:
            raise InputError(f"--output: cannot write {path}: {error.strerror}") from None

    def write(self, results: Any) -> None:
        """Write JSON in one step. Raises OSError."""
        with self._unfinished() as unfinished:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(json.dumps(results, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self._path)

    def _check_existing(self, path: Path, inputs: Sequence[Path], overwrite: bool) -> None:
        try:
            check_plain(self._path)
        except InputError as error:
            raise InputError(f"--output: {error}") from None
        for read in inputs:
            if read.exists() and (self._path.samefile(read) or self._path.is_relative_to(os.path.realpath(read))):
                raise InputError(f"--output: {path} belongs to what is read ({read}), expected another file")
        if not overwrite:
            raise InputError(f"--output: {path} exists, expected a new file; --overwrite replaces it")

    @contextlib.contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A file beside the output, which is not there any more afterwards."""
        unfinished = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        unfinished.touch(exist_ok=False)
        try:
            yield unfinished
        finally:
            unfinished.unlink(missing_ok=True)
