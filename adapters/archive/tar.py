"""Owns the reading of a .tar.gz: one pass over the stream, each member's 512-byte header checked before its bytes.

Invariant: no more is read than an adapter may have, whatever the headers say; headers that change the meaning of the
following one (long names, sparse files, paths and sizes in pax records) are violations.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from adapters.archive.inflate import GZIP, DamagedArchiveError, inflated
from adapters.archive.members import MAX_MEMBERS, Members

RECORD = 512
ZEROS = bytes(RECORD)
MAX_PAX_BYTES = 64 * 1024
MAX_SLACK_BYTES = 1024 * 1024
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]{1,200})=")
_MEANINGFUL = re.compile(rb"path|linkpath|size|hdrcharset|GNU\.sparse\..*")


class _Stream:
    """The unpacked bytes in order; reading more than `limit` bytes is an error."""

    def __init__(self, blocks: Iterator[bytes], limit: int) -> None:
        self._blocks, self._limit, self._rest = blocks, limit, memoryview(b"")
        self._total = 0

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, piece by piece."""
        while size:
            if not self._rest and not self._advance():
                raise DamagedArchiveError("the tar ends too early: it was cut off")
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            yield bytes(piece)

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def skip(self, size: int) -> None:
        for _ in self.pieces(size):
            pass

    def is_zero_to_the_end(self) -> bool:
        """Whether only zeros follow. Reads to the end, so that the checksum of the gzip is verified."""
        while True:
            if bytes(self._rest).strip(b"\0"):
                return False
            if not self._advance():
                return True

    def _advance(self) -> bool:
        block = next(self._blocks, None)
        if block is None:
            return False
        self._total += len(block)
        if self._total > self._limit:
            raise DamagedArchiveError(f"unpacks to more than {self._limit} bytes, the most that this server accepts")
        self._rest = memoryview(block)
        return True


def extract_tar_gz(file: BinaryIO, size: int, members: Members) -> None:
    """Write the members of the .tar.gz in `file` (of `size` bytes) through `members`.

    Raises DamagedArchiveError.
    """
    stream = _Stream(inflated(file, 0, size, GZIP), sum(members.limits.values()) + MAX_SLACK_BYTES)
    for _ in range(MAX_MEMBERS):
        header = stream.take(RECORD)
        if header == ZEROS:
            if stream.take(RECORD) != ZEROS or not stream.is_zero_to_the_end():
                raise DamagedArchiveError("bytes follow the end of the tar: remove them")
            return
        _one_member(_parse(header), stream, members)
    raise DamagedArchiveError(f"found more than {MAX_MEMBERS} members, expected two or three")


def _parse(header: bytes) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise DamagedArchiveError(f"found no header of a tar member where one is expected ({error})") from error
    if info.size < 0:
        raise DamagedArchiveError(f"{info.name[:120]}: found a size of {info.size} bytes")
    return info


def _one_member(info: tarfile.TarInfo, stream: _Stream, members: Members) -> None:
    padded = -(-info.size // RECORD) * RECORD
    if info.type in PAX:
        _check_pax(info, stream, members)
        stream.skip(padded - info.size)
    elif info.type in LONG:
        members.refuse(info.name, "found a long name, expected the name of an adapter's file")
        stream.skip(padded)
    elif info.type in KINDS:
        kind = KINDS[info.type]
        own = members.admit(info.name, kind, info.size)
        if own is not None:
            members.write(own, stream.pieces(info.size), info.size)
            stream.skip(padded - info.size)
        elif kind == "file":
            stream.skip(padded)
    else:
        raise DamagedArchiveError(f"{info.name[:120]}: found a member of type {info.type!r}, expected a plain file")


def _check_pax(info: tarfile.TarInfo, stream: _Stream, members: Members) -> None:
    """Read the records of a pax header: times and owners do not matter, another name or size would."""
    if info.size > MAX_PAX_BYTES:
        raise DamagedArchiveError(f"found a pax header of {info.size} bytes, expected at most {MAX_PAX_BYTES}")
    records = stream.take(info.size)
    while records.strip(b"\0"):
        match = _PAX_RECORD.match(records)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(records):
            raise DamagedArchiveError("found a pax header that cannot be read")
        if _MEANINGFUL.fullmatch(match[2]):
            key = match[2].decode("utf-8", "backslashreplace")
            members.refuse(info.name, f"found {key!r} in a pax header, expected none: pack the files anew")
        records = records[length:]
