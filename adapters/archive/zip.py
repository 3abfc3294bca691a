"""Owns the reading of a .zip: its directory is bounded before it is parsed, its members must match the directory.

Python's zipfile parses the directory. It checks neither that the directory is small, ends where its end record begins
and has the number of entries declared, nor that the header before each member agrees in more than the name; while
unpacking it ignores what follows the end of the compressed data or the declared size. All of that is checked here.

Invariant: every byte written was declared twice alike (in the directory and before the member), belongs to no other
member, and passed the member's checksum.
"""

import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from adapters.archive.inflate import RAW_DEFLATE, DamagedArchiveError, inflated, stored
from adapters.archive.members import MAX_MEMBERS, Members

MAX_DIRECTORY_BYTES = 512 * 1024
MAX_COMMENT_BYTES = 65535
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
LOCAL = struct.Struct("<4s5H3L2H")
ENCRYPTED, STREAMED, PATCHED, STRONG, UTF8, MASKED = 0x1, 0x8, 0x20, 0x40, 0x800, 0x2000
COMPARED = ENCRYPTED | STREAMED | PATCHED | STRONG | MASKED
IN_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Directory:
    """Where the central directory is, and how many members it declares. begin, length: in bytes."""

    members: int
    begin: int
    length: int


def extract_zip(file: BinaryIO, size: int, members: Members) -> None:
    """Write the members of the zip in `file` (of `size` bytes) through `members`.

    Raises DamagedArchiveError.
    """
    directory = _directory(file, size)
    try:
        with ZipFile(file) as archive:
            infos = archive.infolist()
    except (BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise DamagedArchiveError(f"the archive's directory is damaged ({error})") from error
    if len(infos) != directory.members:
        raise DamagedArchiveError(f"found {len(infos)} members in the directory, which declares {directory.members}")
    begins = {id(info): _data_begin(file, info, directory) for info in infos}
    _check_overlaps(infos, begins, directory)
    for info in infos:
        name = info.orig_filename
        own = members.admit(name, _kind(info), info.file_size)
        if problem := _unsupported(info):
            members.refuse(name, problem)
        elif own is not None:
            members.write(own, _content(file, info, begins[id(info)]), info.file_size)


def _directory(file: BinaryIO, size: int) -> Directory:
    """Read the end records; the directory must be of bounded size and end where they begin."""
    end, (_, disk, first_disk, here, total, length, begin, _) = _end_record(file, size)
    locator_at = end - LOCATOR64.size
    if locator_at >= END64.size:
        file.seek(locator_at - END64.size)
        record, locator = file.read(END64.size), file.read(LOCATOR64.size)
        if locator.startswith(b"PK\6\7"):
            if not record.startswith(b"PK\6\6"):
                raise DamagedArchiveError("found no zip64 end record before its locator")
            _, _, _, _, disk, first_disk, here, total, length, begin = END64.unpack(record)
            end = locator_at - END64.size
            if LOCATOR64.unpack(locator)[2] != end:
                raise DamagedArchiveError("the zip64 locator points elsewhere, not to its end record")
    if disk or first_disk or here != total:
        raise DamagedArchiveError("found an archive in several parts, expected one")
    if total > MAX_MEMBERS or length > MAX_DIRECTORY_BYTES:
        raise DamagedArchiveError(
            f"found a directory of {total} members and {length} bytes, expected at most {MAX_MEMBERS} and "
            f"{MAX_DIRECTORY_BYTES}"
        )
    if begin + length != end:
        raise DamagedArchiveError(f"the directory ends at {begin + length}, but its end record begins at {end}")
    return Directory(total, begin, length)


def _end_record(file: BinaryIO, size: int) -> tuple[int, tuple[Any, ...]]:
    """Where the end record is, and its fields: the last one in the file, whose comment ends with the file.

    zipfile takes the last one too. A comment with another one in it would be that.
    """
    tail_at = max(0, size - END.size - MAX_COMMENT_BYTES)
    file.seek(tail_at)
    tail = file.read(END.size + MAX_COMMENT_BYTES)
    at = tail.rfind(b"PK\5\6")
    fields = END.unpack_from(tail, at) if 0 <= at <= len(tail) - END.size else None
    if fields is None or at + END.size + fields[-1] != len(tail):
        raise DamagedArchiveError(
            "found no end record where the archive ends: it was cut off, or bytes follow it; pack or copy it again"
        )
    return tail_at + at, fields


def _data_begin(file: BinaryIO, info: ZipInfo, directory: Directory) -> int:
    """Where a member's bytes begin, by the header before them, which has to agree with the directory."""
    header = b""
    if info.header_offset < directory.begin:
        file.seek(info.header_offset)
        header = file.read(LOCAL.size)
    if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
        raise DamagedArchiveError(f"{info.orig_filename[:120]}: found no header where the directory says it is")
    _, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = LOCAL.unpack(header)
    name = file.read(name_length).decode("utf-8" if flags & UTF8 else "cp437", "replace")
    here = {"name": name, "flags": flags & COMPARED, "method": method}
    there = {"name": info.orig_filename, "flags": info.flag_bits & COMPARED, "method": info.compress_type}
    if not flags & STREAMED and IN_ZIP64 not in (packed, unpacked):
        here |= {"checksum": crc, "size": unpacked, "packed size": packed}
        there |= {"checksum": info.CRC, "size": info.file_size, "packed size": info.compress_size}
    differing = [key for key in here if here[key] != there[key]]
    if differing:
        raise DamagedArchiveError(
            f"{info.orig_filename[:120]}: the directory and the member's header differ in {', '.join(differing)}"
        )
    begin: int = info.header_offset + LOCAL.size + name_length + extra_length
    return begin


def _check_overlaps(infos: Iterable[ZipInfo], begins: dict[int, int], directory: Directory) -> None:
    """Refuse members that share bytes, by which a small archive unpacks to much.

    zipfile refuses them in `open` since CPython 3.11.8 and 3.12.2 (CVE-2024-0450), but `open` is not used here.
    """
    spans = sorted((info.header_offset, begins[id(info)] + info.compress_size) for info in infos)
    if any(this[1] > following[0] for this, following in pairwise([*spans, (directory.begin, 0)])):
        raise DamagedArchiveError("members overlap each other or the directory")


def _kind(info: ZipInfo) -> str:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "device or pipe"
    return "folder" if info.orig_filename.endswith("/") or stat.S_ISDIR(mode) else "file"


def _unsupported(info: ZipInfo) -> str | None:
    if info.flag_bits & (ENCRYPTED | STRONG | MASKED):
        return "found an encrypted member, expected none"
    if info.flag_bits & PATCHED or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        return f"found compression method {info.compress_type}, expected 0 (stored) or 8 (deflate)"
    return None


def _content(file: BinaryIO, info: ZipInfo, begin: int) -> Iterator[bytes]:
    """The member's bytes; once they are read, its checksum must be theirs."""
    deflated = info.compress_type == ZIP_DEFLATED
    length = info.compress_size
    crc = 0
    for block in inflated(file, begin, length, RAW_DEFLATE) if deflated else stored(file, begin, length):
        crc = zlib.crc32(block, crc)
        yield block
    if crc != info.CRC:
        raise DamagedArchiveError(f"{info.orig_filename[:120]}: the checksum is not the content's")
