"""Zips that unpack to more than they should, elsewhere than they should, or that lie about themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any
from zlib import crc32

from tests.hostile import good
from tests.hostile.attack import Attack, Attacks, Setting
from tests.hostile.good import CONFIG_FILE, WEIGHTS_FILE
from tests.hostile.zip_writer import STORED, Member, archive, archive64, deflated, end_record

ROOT = "the root of the archive"
LINK, DEVICE, PIPE, FOLDER = 0o120777, 0o020666, 0o010644, 0o040755


def _sent(make: Callable[[Setting], bytes], *words: str) -> Attack:
    return Attack(400, "invalid_adapter", words, lambda s: good.archived(make(s)))


def sound(setting: Setting) -> list[Member]:
    return [Member(name.encode(), data) for name, data in good.files(setting).items()]


def _plus(*members: Member) -> Callable[[Setting], bytes]:
    return lambda s: archive([*sound(s), *members])


def _extra(name: str | bytes, *words: str, data: bytes = b"x", **fields: Any) -> Attack:
    """One member more than the sound ones."""
    raw = name.encode() if isinstance(name, str) else name
    flags = 0x800 if isinstance(name, str) and not name.isascii() else 0
    return _sent(_plus(Member(raw, data, flags=flags, **fields)), *words)


def _pickled(name: str) -> Attack:
    """A pickle in place of the weights."""
    return _sent(
        lambda s: archive([sound(s)[0], Member(name.encode(), b"\x80\x02cos\nsystem\n")]),
        f"{name}: the weights must be in {WEIGHTS_FILE}; this is a pickle",
        f"{WEIGHTS_FILE}: missing",
    )


def _config(*words: str, **fields: Any) -> Attack:
    """The config's member with other fields."""
    return _sent(lambda s: archive([Member(CONFIG_FILE.encode(), good.config(), **fields), sound(s)[1]]), *words)


def _renamed(name: str, *words: str) -> Attack:
    return _sent(
        lambda s: archive([Member(name.encode(), good.config()), sound(s)[1]]), *words, f"{CONFIG_FILE}: missing"
    )


def _bomb(setting: Setting, **told: Any) -> bytes:
    """Weights of zeros, over the limit once unpacked, a thousandth of it here."""
    zeros = bytes(setting.max_adapter_bytes + 1024 * 1024)
    return archive([sound(setting)[0], Member(WEIGHTS_FILE.encode(), zeros, here=told, there=told)])


def _overlapping(setting: Setting) -> bytes:
    """The weights' member lies inside the README's data, so that its bytes count twice."""
    config, weights = sound(setting)
    outer = Member(b"README.md", weights.local(), STORED)
    weights.there["offset"] = len(config.local()) + 30 + len(outer.name)
    body = config.local() + outer.local()
    directory = config.entry(0) + outer.entry(len(config.local())) + weights.entry(0)
    return body + directory + end_record(3, len(directory), len(body))


def _all_the_same(setting: Setting) -> bytes:
    """Fifty directory entries of one member."""
    config, weights = sound(setting)
    body = config.local() + weights.local()
    directory = config.entry(0) + weights.entry(len(config.local())) * 50
    return body + directory + end_record(51, len(directory), len(body))


def _all_the_same_ignored(setting: Setting) -> bytes:
    """Two names for the bytes of one ignored member."""
    config, weights, more = [*sound(setting), Member(b"optimizer.pt", bytes(1000))]
    body = config.local() + weights.local()
    directory = config.entry(0) + weights.entry(len(config.local())) + more.entry(len(body)) * 2
    body += more.local()
    return body + directory + end_record(4, len(directory), len(body))


def _two_directories(setting: Setting) -> bytes:
    """A comment that holds a directory of its own, of other members, and its end record."""
    whole = archive(sound(setting))
    directory = Member(CONFIG_FILE.encode(), b"{}").entry(0)
    return archive(sound(setting), comment=directory + end_record(1, len(directory), len(whole) + 1))


def _many(count: int) -> Callable[[Setting], bytes]:
    return _plus(*(Member(b"f%d" % i, method=STORED) for i in range(count)))


def _inside(name: str, make: Callable[[dict[str, bytes]], bytes]) -> Attack:
    """An adapter's archive inside an archive, as the only member."""
    return _sent(
        lambda s: good.zipped({name: make(good.files(s))}), f"found the archive {name} in it", f"{CONFIG_FILE}: missing"
    )


NAMES: Attacks = {
    "../": _extra("../evil.txt", "../evil.txt: a path that leaves"),
    "a/../../": _extra("a/../../evil.txt", "a path that leaves"),
    "..\\": _extra("..\\evil.txt", "a path that leaves"),
    "../ to the config": _renamed(f"../{CONFIG_FILE}", "a path that leaves"),
    "absolute": _extra("/etc/cron.d/evil", "an absolute path"),
    "absolute config": _renamed(f"/{CONFIG_FILE}", "an absolute path"),
    "two slashes": _extra("//host/share", "an absolute path"),
    "UNC": _extra("\\\\host\\share\\evil", "an absolute path"),
    "drive": _extra("C:\\evil.txt", "a Windows drive"),
    "drive without a slash": _extra("c:evil.txt", "a Windows drive"),
    "stream of NTFS": _extra(f"{CONFIG_FILE}:evil", "a stream of adapter_config.json"),
    "CON": _extra("CON", "a device's name"),
    "nul.txt": _extra("nul.txt", "a device's name"),
    "COM1": _extra("COM1.json", "a device's name"),
    "backslash": _extra("a\\evil.txt", "a backslash"),
    "NUL in the name": _extra(CONFIG_FILE.encode() + b"\0.txt", "do not print"),
    "newline in the name": _extra("a\n  - forged", "do not print"),
    "no name": _extra("", "without a name"),
    "60,000 characters": _extra("x" * 60_000, "a name of 60000 characters, expected at most"),
    "right-to-left": _extra("\u202egpj.exe", "do not print"),
    "in a folder, the weights not": _sent(
        lambda s: archive([Member(b"poet/" + CONFIG_FILE.encode(), good.config()), sound(s)[1]]),
        f"{CONFIG_FILE}: lies in poet/ and {WEIGHTS_FILE} at the root",
    ),
    "duplicate but for ././": _extra(f"././{CONFIG_FILE}", "duplicate member"),
    "duplicate but for //": _sent(_plus(Member(b"runs//a"), Member(b"runs/./a")), "runs/./a: duplicate member"),
    "../ behind a .": _extra("./.././evil", "a path that leaves"),
    "absolute behind a .": _extra(".//etc/passwd", "an absolute path"),
    "only slashes": _extra("///", "an absolute path", data=b""),
    "upper case": _renamed("ADAPTER_CONFIG.JSON.", "almost the name of an adapter's file"),
    "full width in a folder": _extra("a/\uff21dapter_config.json", "almost the name of an adapter's file"),
    "two adapters in two folders": _sent(
        lambda s: archive(
            [Member(f"{folder}/{m.name.decode()}".encode(), m.data) for folder in ("a", "b") for m in sound(s)]
        ),
        f"{CONFIG_FILE}: found in a/ and in b/",
        f"{WEIGHTS_FILE}: found in a/ and in b/",
    ),
    "a checkpoint below the adapter": _extra(
        f"out/checkpoint-500/{CONFIG_FILE}", f"{CONFIG_FILE}: found at the root and in out/checkpoint-500/"
    ),
    "two configs, the second of 4 GB": _extra(
        f"b/{CONFIG_FILE}", f"{CONFIG_FILE}: found", here={"size": 2**32 - 2}, there={"size": 2**32 - 2}
    ),
    "out of a folder that is ignored": _extra("runs/../../evil", "a path that leaves"),
    "out of __MACOSX": _extra("__MACOSX/../../evil", "a path that leaves"),
    "absolute junk": _extra("/.DS_Store", "an absolute path"),
    "device among the ignored": _extra("runs/nul.txt", "a device's name"),
    "newline in a folder": _extra("runs\n  - forged/x", "do not print"),
    "backslash junk": _extra("__MACOSX\\._x", "a backslash"),
    "full width": _extra("\uff21dapter_config.json", "duplicate member"),
    "pickle": _pickled("adapter_model.bin"),
    "pickle in a folder": _pickled("old/adapter_model.pt"),
    "more weights": _extra(
        "model.safetensors", "model.safetensors: not part of an adapter, but looks like more weights"
    ),
    "pickle in upper case": _pickled("Adapter_Model.BIN"),
    "weights of another name": _sent(
        lambda s: archive([sound(s)[0], Member(b"model.safetensors", sound(s)[1].data)]),
        f"model.safetensors: the weights must be one file called {WEIGHTS_FILE}: rename this one",
        f"{WEIGHTS_FILE}: missing",
    ),
    "a part of the weights": _extra("adapter_model-00001-of-00002.safetensors", "looks like more weights"),
}

CONTENTS: Attacks = {
    "bomb": Attack(413, "adapter_too_large", ("max_adapter_bytes",), lambda s: good.archived(_bomb(s))),
    "bomb that says it is small": _sent(partial(_bomb, size=1000), "unpacks to more than the 1000 bytes"),
    "large README": _extra("./README.md", "README.md: found 70000", "expected at most 65536", data=bytes(70_000)),
    "bomb of a README": _extra(
        "./README.md",
        "what is not part of an adapter unpacks to more than",
        "first README.md (2147483648 bytes)",
        here={"size": 2**31},
        there={"size": 2**31},
    ),
    "says it is larger than it is": _config("config.json: unpacks to", here={"size": 9999}, there={"size": 9999}),
    "member of 4 GB": Attack(
        413, "adapter_too_large", ("max_adapter_bytes",), lambda s: good.archived(_bomb(s, size=2**32 - 2))
    ),
    "sizes differ beside the member": _config("differ in size", here={"size": 1}),
    "packed size differs beside the member": _config("differ in packed size", here={"packed": 1}),
    "checksum differs beside the member": _config("differ in checksum", here={"crc": 1}),
    "name differs beside the member": _config("differ in name", here={"name": b"adapter_confiG.json"}),
    "method differs beside the member": _config("differ in method", here={"method": STORED}),
    "wrong checksum": _config("checksum is not the content's", here={"crc": 1}, there={"crc": 1}),
    "damaged data": _config("compressed data is damaged", raw=b"\xff" * 100),
    "data cut short": _config("cut off", raw=b"\x63"),
    "bytes behind the end of the data": _config(
        "bytes follow the end of the compressed data", raw=deflated(good.config()) + b"evil" * 10
    ),
    "says it is its own beginning": _config(
        "unpacks to more than the 8",
        here={"size": 8, "crc": crc32(good.config()[:8])},
        there={"size": 8, "crc": crc32(good.config()[:8])},
    ),
    "bytes behind the data": _config("bytes follow the end of the compressed data", raw=b"\x03\0" + b"evil" * 10),
    "stored that is deflated": _config("checksum is not the content's", raw=b"x", method=STORED),
    "packed size past the end": _config("overlap", here={"packed": 2**31}, there={"packed": 2**31}),
    "offset past the end": _config("no header where", there={"offset": 2**31}),
    "offset into the data": _config("no header where", there={"offset": 5}),
    "offset of 2^63": _config(
        "directory", there={"offset": 0xFFFFFFFF, "extra": b"\x01\0\x08\0" + (2**63 + 1).to_bytes(8, "little")}
    ),
    "overlapping members": _sent(_overlapping, "overlap"),
    "fifty entries of one member": _sent(_all_the_same, "overlap"),
    "encrypted": _config("encrypted", flags=0x1),
    "strongly encrypted": _config("encrypted", flags=0x41),
    "masked": _config("encrypted", flags=0x2000),
    "bzip2": _config("compression method 12", method=12),
    "lzma": _config("compression method 14", method=14),
    "zstd": _config("compression method 93", method=93),
    "unknown method": _config("compression method 77", method=77),
    "link": _config("found a link", mode=LINK),
    "link to elsewhere": _extra("evil", "found a link", data=b"/etc/passwd", mode=LINK),
    "link among the junk": _extra("__MACOSX/._evil", "found a link", data=b"/etc/passwd", mode=LINK),
    "link that ends in a slash": _extra("latest/", "found a link", data=b"checkpoint-500", mode=LINK),
    "pipe among the ignored": _extra("runs/x", "found a device or pipe", mode=PIPE),
    "device": _config("found a device", mode=DEVICE),
    "pipe": _config("found a device or pipe", mode=PIPE),
    "folder with bytes": _extra("poet/", "found a folder of 5 bytes", data=b"bytes", mode=FOLDER),
    "encrypted among the ignored": _sent(_plus(Member(b"optimizer.pt", b"x", flags=0x1)), "encrypted"),
    "lzma among the ignored": _extra("optimizer.pt", "compression method 14", method=14),
    "ignored members that unpack to much": _sent(
        _plus(*(Member(b"runs/%d" % i, here={"size": 2**31}, there={"size": 2**31}) for i in range(4))),
        "what is not part of an adapter unpacks to more than",
    ),
    "an ignored member that overlaps": _sent(_all_the_same_ignored, "overlap"),
    "config that is a folder": _config("found a folder", mode=FOLDER),
    "duplicate member": _extra(CONFIG_FILE, f"{CONFIG_FILE}: duplicate member", data=good.config()),
    "duplicate among the ignored": _sent(_plus(Member(b"runs/a"), Member(b"Runs/A")), "duplicate member"),
    "duplicate but for case": _extra(CONFIG_FILE.title(), "duplicate member"),
    "duplicate but for ./": _extra(f"./{WEIGHTS_FILE}", "duplicate member"),
    "1,100 members": _sent(_many(1100), "expected at most 1024"),
    "70,000 members": _sent(
        lambda s: archive64([Member(b"f", method=STORED)] * 3, count=70_000), "expected at most 1024"
    ),
    "directory that says fewer": _sent(lambda s: archive(sound(s), count=1), "which declares 1"),
    "directory of 4 GB": _sent(lambda s: archive(sound(s), length=2**32 - 2), "expected at most 1024"),
    "directory elsewhere": _sent(lambda s: archive(sound(s), offset=0), "its end record begins at"),
    "directory past the end": _sent(lambda s: archive(sound(s), offset=2**31), "its end record begins at"),
    "directory of another kind": _sent(
        lambda s: archive(sound(s)).replace(b"PK\1\2", b"PK\1\3"), "directory is damaged"
    ),
    "zip64 directory of 2^63 bytes": _sent(lambda s: archive64(sound(s), length=2**63), "expected at most 1024"),
    "zip64 of 2^63 members": _sent(lambda s: archive64(sound(s), count=2**63), "expected at most 1024"),
    "zip64 locator that lies": _sent(lambda s: archive64(sound(s), at=0), "locator points elsewhere"),
    "several disks": _sent(lambda s: archive(sound(s), disk=1), "several parts"),
    "comment cut off": _sent(lambda s: archive(sound(s), comment=b"hello")[:-1], "no end record"),
    "comment longer than it says": _sent(lambda s: archive(sound(s), comment=b"hello") + b"!", "no end record"),
    "comment with another directory": _sent(_two_directories, "its end record begins at"),
    "comment that is an end record": _sent(
        lambda s: archive(sound(s), comment=end_record(0, 0, 0)), "end record begins"
    ),
    "program in front": _sent(lambda s: b"#!/bin/sh\n" + archive(sound(s)), "neither a .zip nor a .tar.gz"),
    "member in front": _sent(lambda s: Member(b"evil").local() + archive(sound(s)), "its end record begins at"),
    "bytes behind": _sent(lambda s: archive(sound(s)) + b"evil", "no end record"),
    "cut off": _sent(lambda s: archive(sound(s))[:-1], "no end record"),
    "half": _sent(lambda s: archive(sound(s))[: len(archive(sound(s))) // 2], "no end record"),
    "only four bytes": _sent(lambda s: b"PK\3\4", "no end record"),
    "without members": _sent(lambda s: archive([]), f"{CONFIG_FILE}: missing", f"{WEIGHTS_FILE}: missing"),
    "name that is no UTF-8": _sent(_plus(Member(b"\xff\xfe", flags=0x800)), "directory is damaged"),
    "nested zip": _inside("inner.zip", good.zipped),
    "nested tar.gz": _inside("inner.tar.gz", good.tarred),
    "zip as the weights": _sent(
        lambda s: good.zipped({CONFIG_FILE: good.config(), WEIGHTS_FILE: good.zipped(good.files(s))}),
        "not a readable",
    ),
    "everything at once": _sent(
        lambda s: archive(
            [*sound(s)[:1], Member(WEIGHTS_FILE.encode(), b"x"), Member(b"../a"), Member(b"/b"), Member(b"c.gguf")]
        ),
        "../a: a path",
        "/b: an absolute",
        "c.gguf: not part of an adapter, but looks like",
        "not a readable safetensors file",
    ),
    "plain tar": _sent(lambda s: b"adapter_config.json" + bytes(493), "neither a .zip nor a .tar.gz"),
    "7z": _sent(lambda s: b"7z\xbc\xaf\x27\x1c" + bytes(100), "neither a .zip nor a .tar.gz"),
    "rar": _sent(lambda s: b"Rar!\x1a\x07\x01\0" + bytes(100), "neither a .zip nor a .tar.gz"),
    "xz": _sent(lambda s: b"\xfd7zXZ\0" + bytes(100), "neither a .zip nor a .tar.gz"),
    "empty": _sent(lambda s: b"", "neither a .zip nor a .tar.gz"),
    "safetensors": _sent(lambda s: good.weights(s.base), "neither a .zip nor a .tar.gz"),
    "two sound ones": _sent(lambda s: archive(sound(s)) * 2, "its end record begins at"),
    "says it is smaller than it is": _config("unpacks to more than the", here={"size": 10}, there={"size": 10}),
}

ATTACKS: Attacks = {f"zip name: {kind}": attack for kind, attack in NAMES.items()} | {
    f"zip: {kind}": attack for kind, attack in CONTENTS.items()
}
