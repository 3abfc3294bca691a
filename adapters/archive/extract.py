"""Owns an adapter as an archive: a .zip or .tar.gz with its two files in one folder, unpacked under bounds.

Invariant: only the two files of an adapter are written, each within its limit, each created here.
"""

from pathlib import Path

from adapters.archive.inflate import DamagedArchiveError
from adapters.archive.members import AdapterTooLargeError, Members
from adapters.archive.tar import extract_tar_gz
from adapters.archive.zip import extract_zip
from adapters.format.recognize import START_BYTES, recognized
from perft.reading import printable

__all__ = ["AdapterTooLargeError", "extract"]

ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
GZIP_START = b"\x1f\x8b"


def extract(archive: Path, into: Path, max_weights_bytes: int, notes: list[str] | None = None) -> list[str]:
    """Unpack `archive` into the folder `into`; returns the violations found, and adds to `notes` what was ignored.

    Without violations the adapter's files are in `into`; with violations some of them may be. Raises
    AdapterTooLargeError for weights over the limit, and OSError if writing fails.
    """
    members = Members(into, max_weights_bytes)
    size = archive.stat().st_size
    with archive.open("rb") as file:
        start = file.read(START_BYTES)
        try:
            if start.startswith(ZIP_STARTS):
                extract_zip(file, size, members)
            elif start.startswith(GZIP_START):
                extract_tar_gz(file, size, members)
            else:
                return [printable(f"the archive: {_no_archive(start)}")]
        except DamagedArchiveError as error:
            return [*members.violations, printable(f"the archive: {error}")]
    ignored = members.finish()
    if notes is not None:
        notes += ignored
    return members.violations


def _no_archive(start: bytes) -> str:
    found = recognized(start)
    return "found neither a .zip nor a .tar.gz, judging by its first bytes" + (f", but {found.text}" if found else "")
