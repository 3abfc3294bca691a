"""Owns the reading of a .tar.gz: one pass over the stream, each member's 512-byte header checked before its bytes.

Invariant: no more is read than an archive of an adapter may have, whatever the headers say. Of the headers that change
the meaning of the following one only its longer name counts; others (sparse files, links, sizes) are violations.
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
MAX_LONG_NAME_BYTES = 4096
MAX_HEADERS = 4 * MAX_MEMBERS
MAX_SLACK_BYTES = 8 * 1024 * 1024
"""For the headers of all members, and what fills their last blocks up."""
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
_MEANINGFUL = re.compile(rb"linkpath|size|hdrcharset|GNU\.sparse\..*")


class _Stream:
    """The unpacked bytes in order; reading more than `limit` bytes is an error."""

    def __init__(self, blocks: Iterator[bytes], limit: int) -> None:
        self._blocks, self._limit, self._rest = blocks, limit, memoryview(b"")
        self._total = 0

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, piece by piece."""
        yield from (bytes(view) for view in self._views(size))

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def skip(self, size: int) -> None:
        for _ in self._views(size):
            pass

    def is_zero_to_the_end(self) -> bool:
        """Whether only zeros follow. Reads to the end, so that the checksum of the gzip is verified."""
        while True:
            if bytes(self._rest).strip(b"\0"):
                return False
            if not self._advance():
                return True

    def _views(self, size: int) -> Iterator[memoryview]:
        while size:
            if not self._rest and not self._advance():
                raise DamagedArchiveError("the tar ends too early: it was cut off")
            view, self._rest = self._rest[:size], self._rest[size:]
            size -= len(view)
            yield view

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
    limit = sum(members.limits.values()) + members.max_ignored_bytes + MAX_SLACK_BYTES
    stream = _Stream(inflated(file, 0, size, GZIP), limit)
    found, name = 0, None
    for _ in range(MAX_HEADERS):
        header = stream.take(RECORD)
        if header == ZEROS:
            if stream.take(RECORD) != ZEROS or not stream.is_zero_to_the_end():
                raise DamagedArchiveError("bytes follow the end of the tar: remove them")
            if name is not None:
                raise DamagedArchiveError("found a long name without the member that it belongs to")
            return
        info = _parse(header)
        if info.type in PAX or info.type in LONG:
            longer = _longer_name(info, stream, members)
            if longer is not None and name is not None:
                raise DamagedArchiveError("found two long names for one member")
            name = name if longer is None else longer
            continue
        found += 1
        if found > MAX_MEMBERS:
            break
        info.name, name = name or info.name, None
        _one_member(info, stream, members)
    raise DamagedArchiveError(f"found more than {MAX_MEMBERS} members, expected the two files of an adapter")


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
    if info.type not in KINDS:
        raise DamagedArchiveError(f"{info.name[:120]}: found a member of type {info.type!r}, expected a plain file")
    kind = KINDS[info.type]
    if kind == "file" and info.name.endswith("/"):
        kind = "folder"  # as the oldest tars write it
    own = members.admit(info.name, kind, info.size)
    if own is not None:
        members.write(own, stream.pieces(info.size), info.size)
        stream.skip(padded - info.size)
    elif kind in ("file", "folder"):
        stream.skip(padded)


def _longer_name(info: tarfile.TarInfo, stream: _Stream, members: Members) -> str | None:
    """Read a header that says more of the following member: its name, if it is in there."""
    padded = -(-info.size // RECORD) * RECORD
    if info.type in PAX:
        name = _pax_path(info, stream, members)
        stream.skip(padded - info.size)
        return name
    if info.type == tarfile.GNUTYPE_LONGLINK:
        members.refuse(info.name, "found the long name of a link, expected plain files")
    if info.size > MAX_LONG_NAME_BYTES:
        raise DamagedArchiveError(f"found a long name of {info.size} bytes, expected at most {MAX_LONG_NAME_BYTES}")
    raw = stream.take(padded)[: info.size]
    return raw.removesuffix(b"\0").decode("utf-8", "surrogateescape") if info.type == tarfile.GNUTYPE_LONGNAME else None


def _pax_path(info: tarfile.TarInfo, stream: _Stream, members: Members) -> str | None:
    """Read the records of a pax header, of which only the following member's path counts, and return that.

    Times and owners do not matter; another size, link or character set would, and so would a path of all members.
    """
    if info.size > MAX_PAX_BYTES:
        raise DamagedArchiveError(f"found a pax header of {info.size} bytes, expected at most {MAX_PAX_BYTES}")
    records, paths = stream.take(info.size), list[str]()
    while records.strip(b"\0"):
        match = _PAX_RECORD.match(records)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(records):
            raise DamagedArchiveError("found a pax header that cannot be read")
        if match[2] == b"path" and info.type == tarfile.XHDTYPE:
            paths.append(records[match.end() : length].removesuffix(b"\n").decode("utf-8", "surrogateescape"))
        elif match[2] == b"path" or _MEANINGFUL.fullmatch(match[2]):
            key = match[2].decode("utf-8", "backslashreplace")
            members.refuse(info.name, f"found {key!r} in a pax header, expected none: pack the files anew")
        records = records[length:]
    if len(paths) > 1:
        raise DamagedArchiveError("found two paths in a pax header")
    return paths[0] if paths else None
