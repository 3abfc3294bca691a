"""Owns a writer of zips that lets every field of every record lie. Python's own only writes true ones."""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STORED, DEFLATED = 0, 8


def deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


@dataclass
class Member:
    """One member. `here` and `there` replace fields of the local header and of the directory's entry.

    Their keys: name, flags, method, crc, packed, size, offset, attributes, extra. raw: the packed bytes, if others.
    """

    name: bytes
    data: bytes = b""
    method: int = DEFLATED
    flags: int = 0
    mode: int = 0o100644
    raw: bytes | None = None
    here: dict[str, Any] = field(default_factory=dict)
    there: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        packed = self.packed()
        return {
            "name": self.name, "flags": self.flags, "method": self.method, "crc": zlib.crc32(self.data),
            "packed": len(packed), "size": len(self.data), "attributes": self.mode << 16, "extra": b"",
        }  # fmt: skip

    def packed(self) -> bytes:
        if self.raw is not None:
            return self.raw
        return self.data if self.method == STORED else deflated(self.data)

    def local(self) -> bytes:
        """The header beside the data, and the data."""
        f = self.fields() | self.here
        sizes = struct.pack("<LLL", f["crc"], f["packed"], f["size"])
        head = struct.pack("<4s5H", b"PK\3\4", 20, f["flags"], f["method"], 0, 33) + sizes
        return head + struct.pack("<2H", len(f["name"]), len(f["extra"])) + f["name"] + f["extra"] + self.packed()

    def entry(self, offset: int) -> bytes:
        """The directory's entry."""
        f = self.fields() | {"offset": offset} | self.there
        head = struct.pack("<4s6H", b"PK\1\2", 0x314, 20, f["flags"], f["method"], 0, 33)
        sizes = struct.pack("<3L", f["crc"], f["packed"], f["size"])
        rest = struct.pack("<5H2L", len(f["name"]), len(f["extra"]), 0, 0, 0, f["attributes"], f["offset"])
        return head + sizes + rest + f["name"] + f["extra"]


def end_record(count: int, length: int, offset: int, comment: bytes = b"", disk: int = 0) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, count, count, length, offset, len(comment)) + comment


def end_record64(count: int, length: int, offset: int, at: int) -> bytes:
    """The zip64 end record, which lies at `at`, and its locator."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
    return record + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)


def archive(members: Iterable[Member], **end: Any) -> bytes:
    """A zip of the members. `end` replaces arguments of the end record."""
    body, directory, count = b"", b"", 0
    for member in members:
        directory += member.entry(len(body))
        body += member.local()
        count += 1
    told = {"count": count, "length": len(directory), "offset": len(body)} | end
    return body + directory + end_record(**told)


def archive64(members: Iterable[Member], **end: Any) -> bytes:
    """The same as a zip64. `end` replaces arguments of the zip64 end record."""
    plain = archive(members)
    body = plain[:-22]
    _, _, _, _, count, length, offset, _ = struct.unpack("<4s4H2LH", plain[-22:])
    told = {"count": count, "length": length, "offset": offset, "at": len(body)} | end
    return (
        body
        + end_record64(**told)
        + end_record(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)[:8]
        + struct.pack("<2H2LH", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )
