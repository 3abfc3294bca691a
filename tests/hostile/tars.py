"""Archives .tar.gz that unpack to more than they should, elsewhere than they should, or that lie about themselves."""

import gzip
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from tests.hostile import good
from tests.hostile.attack import Attack, Attacks, Setting
from tests.hostile.good import CONFIG_FILE, WEIGHTS_FILE

END = bytes(1024)
GB = 1024**3


def _sent(make: Callable[[Setting], bytes], *words: str) -> Attack:
    return Attack(400, "invalid_adapter", words, lambda s: good.archived(make(s)))


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One member, header and padded data; `fields` replace those of its header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def sound(setting: Setting) -> bytes:
    return b"".join(member(name, data) for name, data in good.files(setting).items())


def packed(parts: Iterable[bytes]) -> bytes:
    return gzip.compress(b"".join(parts), mtime=0)


def _extra(member_bytes: bytes, *words: str) -> Attack:
    """One member more than the sound ones, before them."""
    return _sent(lambda s: packed([member_bytes, sound(s), END]), *words)


def _config(*words: str, **fields: Any) -> Attack:
    """The config's member with other fields."""
    return _sent(
        lambda s: packed([member(CONFIG_FILE, **fields), member(WEIGHTS_FILE, good.weights(s.base)), END]), *words
    )


def _renamed(name: str, *words: str) -> Attack:
    return _sent(
        lambda s: packed([member(name, good.config()), member(WEIGHTS_FILE, good.weights(s.base)), END]),
        *words,
        f"{CONFIG_FILE}: missing",
    )


def _cut(where: Callable[[bytes], int], *words: str) -> Attack:
    """Cut before it is compressed: the gzip is sound, the tar is not."""
    return _sent(lambda s: packed([(sound(s) + END)[: where(sound(s))]]), *words)


def _gzip(change: Callable[[bytes], bytes], *words: str) -> Attack:
    return _sent(lambda s: change(packed([sound(s), END])), *words)


def zeros(size: int) -> bytes:
    """A gzip's deflate blocks of that many zeros, made without compressing each: one block, repeated."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = engine.compress(bytes(16 * 1024 * 1024)) + engine.flush(zlib.Z_FULL_FLUSH)
    return block * (size // (16 * 1024 * 1024))


def bomb(head: bytes, size: int) -> bytes:
    """A gzip of `head` and then zeros; its checksum is wrong, but nobody should come so far."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = engine.compress(head) + engine.flush(zlib.Z_FULL_FLUSH)
    header = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    return header + start + zeros(size) + b"\x03\0" + struct.pack("<2L", 0, (size + len(head)) % 2**32)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header."""
    data = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + 2))
        data += str(length).encode() + text
    return member("PaxHeader", data, kind)


def _checksummed(header: bytes) -> bytes:
    """A tar header whose checksum is right again."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def _with_size(raw: bytes) -> bytes:
    """The config's header with `raw` as its size."""
    header = member(CONFIG_FILE)
    return _checksummed(header[:124] + raw.ljust(12, b"\0") + header[136:])


_LARGE = Attack(
    413,
    "adapter_too_large",
    ("max_adapter_bytes",),
    lambda s: good.archived(bomb(member(WEIGHTS_FILE, size=8 * GB), GB // 2)),
)
_PATHS = {
    "../": ("../evil", "a path that leaves"),
    "a/../../": ("a/../../evil", "a path that leaves"),
    "absolute": ("/etc/cron.d/evil", "an absolute path"),
    "drive": ("C:\\evil", "a Windows drive"),
    "UNC": ("\\\\host\\share", "an absolute path"),
    "LPT1": ("LPT1", "a device's name"),
    "backslash": ("a\\b", "a backslash"),
    "newline": ("a\n  - forged", "do not print"),
    "not UTF-8": ("\udcff\udcfe", "do not print"),
    "absolute behind a .": (".//etc/passwd", "an absolute path"),
    "out of what is ignored": ("runs/../../evil", "a path that leaves"),
    "almost the config": ("poet/Adapter_Config.json", "almost the name of an adapter's file"),
    "no name": ("", "without a name"),
    "converted weights": ("adapter_model.gguf", "looks like more weights"),
    "more weights": ("old/model.safetensors", "looks like more weights"),
    "a second adapter": (f"b/{CONFIG_FILE}", f"{CONFIG_FILE}: found in b/ and at the root"),
}
CONTENTS: Attacks = {
    "weights of 8 GB": _LARGE,
    "bomb of a file more": _sent(lambda s: bomb(member("evil", size=GB // 2), GB // 2), "unpacks to more than"),
    "bomb behind the end": _sent(lambda s: bomb(sound(s) + END, GB // 2), "unpacks to more than"),
    "bomb of a pax header": _sent(
        lambda s: bomb(member("x", kind=b"x", size=GB // 2), GB // 2), "pax header of 536870912"
    ),
    "bomb of a long name": _sent(
        lambda s: bomb(member("x", kind=b"L", size=GB // 2), GB // 2), "a long name of 536870912"
    ),
    "config of 4 GB": _sent(lambda s: bomb(member(CONFIG_FILE, size=4 * GB), 2**27), "found 4294967296 bytes"),
    "nested tar.gz": _sent(
        lambda s: good.tarred({"inner.tar.gz": good.tarred(good.files(s))}), "the archive inner.tar.gz in it"
    ),
    "gzip of a gzip": _sent(lambda s: gzip.compress(packed([sound(s), END])), "no header of a tar member"),
    "gzip of a zip": _sent(lambda s: gzip.compress(good.zipped(good.files(s))), "a tar"),
    "../ to the config": _renamed(f"../{CONFIG_FILE}", "a path that leaves"),
    "absolute config": _renamed(f"/{CONFIG_FILE}", "an absolute path"),
    "in a folder, the weights not": _sent(
        lambda s: packed([member(f"a/{CONFIG_FILE}", good.config()), member(WEIGHTS_FILE, good.weights(s.base)), END]),
        f"{CONFIG_FILE}: lies in a/ and {WEIGHTS_FILE} at the root",
    ),
    "link": _config("found a link", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": _config("found a link", kind=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "link and then through it": _extra(
        member("a", kind=tarfile.SYMTYPE, linkname="/tmp") + member("a/evil", b"x"),
        "a: found a link",
    ),
    "link, then the file": _extra(
        member(CONFIG_FILE, kind=tarfile.SYMTYPE, linkname="/tmp/evil"), "found a link", "duplicate member"
    ),
    "character device": _config("found a device", kind=tarfile.CHRTYPE),
    "block device": _config("found a device", kind=tarfile.BLKTYPE),
    "pipe": _config("found a pipe", kind=tarfile.FIFOTYPE),
    "folder with bytes": _extra(member("poet", b"x", kind=tarfile.DIRTYPE), "found a folder of 1 bytes"),
    "link among the junk": _extra(member("__MACOSX/._x", kind=tarfile.SYMTYPE, linkname="/etc"), "found a link"),
    "device among the ignored": _extra(member("runs/x", kind=tarfile.CHRTYPE), "found a device"),
    "many ignored members that unpack to much": _sent(
        lambda s: bomb(member("runs/a", bytes(700_000)) + member("runs/b", size=2 * GB), GB // 2),
        "what is not part of an adapter unpacks to more than",
        "runs/b (2147483648 bytes)",
    ),
    "config that is a folder": _config("found a folder", kind=tarfile.DIRTYPE),
    "sparse file": _extra(member("x", kind=tarfile.GNUTYPE_SPARSE), "type b'S'"),
    "contiguous file": _extra(member("x", kind=tarfile.CONTTYPE), "type b'7'"),
    "volume header": _extra(member("x", kind=b"V"), "type b'V'"),
    "unknown type": _extra(member("x", kind=b"Z"), "type b'Z'"),
    "duplicate member": _extra(member(CONFIG_FILE, good.config()), "duplicate member"),
    "duplicate but for case": _extra(member(CONFIG_FILE.upper(), good.config()), "duplicate member"),
    "duplicate but for ./": _extra(member(f"./{CONFIG_FILE}", good.config()), "duplicate member"),
    "a thousand members": _extra(b"".join(member(f"f{i}") for i in range(1100)), "more than 1024 members"),
    "five thousand pax headers": _extra(pax({"mtime": "1"}) * 5000, "more than 1024 members"),
    "long name that leaves": _extra(member("../" * 100 + "x", b"x"), "a path that leaves"),
    "long name of a device": _extra(member("x/" * 100 + "nul", b"x"), "a device's name"),
    "long name of a link": _extra(member("x", kind=tarfile.SYMTYPE, linkname="y" * 300), "the long name of a link"),
    "long name of 5,000 bytes": _extra(member("x" * 5000, b"x"), "a long name of 5001 bytes"),
    "two long names": _sent(
        lambda s: packed([member("x", b"a\0", b"L") * 2, sound(s), END]), "two long names for one member"
    ),
    "long name of nothing": _sent(
        lambda s: packed([sound(s), member("x", b"a\0", b"L"), END]), "without the member that it belongs to"
    ),
    "long name of the second config": _sent(
        lambda s: packed([sound(s), member("x", f"a/{CONFIG_FILE}\0".encode(), b"L"), member("y", b"x"), END]),
        f"{CONFIG_FILE}: found at the root and in a/",
    ),
    "pax path that leaves": _extra(pax({"path": "../evil"}), "a path that leaves"),
    "pax path and long name": _sent(
        lambda s: packed([pax({"path": "a"}), member("x", b"b\0", b"L"), sound(s), END]), "two long names"
    ),
    "two pax paths": _extra(member("x", b"9 path=a\n9 path=b\n", b"x"), "two paths"),
    "pax path for all": _extra(pax({"path": "../evil"}, tarfile.XGLTYPE), "'path' in a pax header"),
    "pax size": _extra(pax({"size": "99999999999"}), "'size' in a pax header"),
    "pax link": _extra(pax({"linkpath": "/etc"}), "'linkpath' in a pax header"),
    "pax sparse": _extra(pax({"GNU.sparse.realsize": "99999999999"}), "'GNU.sparse.realsize' in a pax header"),
    "pax record of length 0": _extra(member("x", b"0 a=b\n", b"x"), "pax header that cannot be read"),
    "pax record past its end": _extra(member("x", b"99 a=b\n", b"x"), "pax header that cannot be read"),
    "pax of garbage": _extra(member("x", b"\xff" * 500, b"x"), "pax header that cannot be read"),
    "size larger than the data": _sent(
        lambda s: packed([member(CONFIG_FILE, size=60_000), END]), "the tar ends too early"
    ),
    "negative size": _sent(lambda s: packed([_with_size(b"\xff" * 12), END]), "found a size of -1"),
    "size of 2^80": _sent(lambda s: packed([_with_size(b"\x80\0\xff" + bytes(9)), END]), f"{CONFIG_FILE}: found"),
    "size that is no number": _sent(lambda s: packed([_with_size(b"evil"), END]), "no header of a tar member"),
    "wrong checksum": _sent(lambda s: packed([b"X" + sound(s)[1:], END]), "no header of a tar member"),
    "random bytes": _sent(lambda s: gzip.compress(bytes(range(256)) * 8), "no header of a tar member"),
    "no end": _cut(len, "the tar ends too early"),
    "half an end": _cut(lambda body: len(body) + 512, "the tar ends too early"),
    "cut in a member": _cut(lambda body: len(body) - 700, "the tar ends too early"),
    "cut in a header": _cut(lambda body: 100, "the tar ends too early"),
    "bytes behind the end": _sent(lambda s: packed([sound(s), END, b"evil"]), "bytes follow the end of the tar"),
    "one zero block": _sent(lambda s: packed([bytes(512), sound(s), END]), "bytes follow the end of the tar"),
    "empty": _sent(lambda s: packed([END]), f"{CONFIG_FILE}: missing", f"{WEIGHTS_FILE}: missing"),
    "of nothing": _sent(lambda s: gzip.compress(b""), "the tar ends too early"),
    "only two bytes": _sent(lambda s: b"\x1f\x8b", "ends too early"),
    "gzip cut off": _gzip(lambda raw: raw[: len(raw) // 2], "ends too early"),
    "gzip without its checksum": _gzip(lambda raw: raw[:-8], "ends too early"),
    "wrong checksum of the gzip": _gzip(lambda raw: raw[:-8] + bytes(4) + raw[-4:], "compressed data is damaged"),
    "wrong length of the gzip": _gzip(lambda raw: raw[:-4] + bytes(4), "compressed data is damaged"),
    "bytes behind the gzip": _gzip(lambda raw: raw + b"evil", "bytes follow the end"),
    "two gzips": _gzip(lambda raw: raw * 2, "bytes follow the end"),
    "other compression": _gzip(lambda raw: raw[:2] + b"\x07" + raw[3:], "compressed data is damaged"),
    "damaged in the middle": _gzip(lambda raw: raw[:40] + b"\xff" * 20 + raw[60:], "the archive"),
    "header name without end": _gzip(lambda raw: raw[:3] + b"\x08" + raw[4:10] + b"x" * 100_000, "ends too early"),
}

ATTACKS: Attacks = {
    f"tar name: {kind}": _extra(member(name, b"x"), words) for kind, (name, words) in _PATHS.items()
} | {f"tar: {kind}": attack for kind, attack in CONTENTS.items()}
