"""Weights files with lying headers, and with tensors that are not those of the adapter."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save

from tests.hostile import good
from tests.hostile.attack import Attack, Attacks, Setting
from tests.hostile.configs import LFS
from tests.hostile.good import Tensors

UNREADABLE = "adapter_model.safetensors: not a readable safetensors file"
MIB = 1024 * 1024
Header = dict[str, Any]


def _sent(make: Callable[[Setting], bytes], *words: str) -> Attack:
    return Attack(400, "invalid_adapter", words, lambda s: good.two_files(good.config(), make(s)))


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def split(raw: bytes) -> tuple[Header, bytes]:
    """The header of a sound file and its data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _header(change: Callable[[Header, list[str]], object], *words: str) -> Attack:
    """Change the header, given with the names of its tensors in the order of their data."""

    def make(setting: Setting) -> bytes:
        header, data = split(good.weights(setting.base))
        change(header, sorted(header, key=lambda name: header[name]["data_offsets"]))
        return with_header(json.dumps(header).encode(), data)

    return _sent(make, UNREADABLE, *words)


def _bytes(change: Callable[[bytes], bytes], *words: str) -> Attack:
    return _sent(lambda s: change(good.weights(s.base)), UNREADABLE, *words)


def _entry(key: str, value: Any, *words: str) -> Attack:
    return _header(lambda h, names: h[names[0]].update({key: value}), *words)


def _moved(begin: int, end: int, *words: str) -> Attack:
    """Move the ends of the second tensor's data."""

    def change(header: Header, names: list[str]) -> None:
        offsets = header[names[1]]["data_offsets"]
        header[names[1]]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]
        shape = (offsets[1] + end - offsets[0] - begin) // 4
        header[names[1]]["shape"] = [shape]

    return _header(change, *words)


def _many(count: int) -> Callable[[bytes], bytes]:
    """That many empty tensors."""
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return lambda raw: with_header(b"{" + entries.encode() + b"}", b"")


def _tensors(change: Callable[[Tensors, list[str]], object], *words: str) -> Attack:
    """Change the tensors, given with their names in order."""

    def make(setting: Setting) -> bytes:
        tensors = good.tensors(setting.base)
        change(tensors, sorted(tensors))
        return save(tensors)

    return _sent(make, *words)


def _value(value: float, *words: str) -> Attack:
    def change(tensors: Tensors, names: list[str]) -> None:
        tensors[names[0]].view(-1)[1] = value

    return _tensors(change, *words)


def _dtype(dtype: torch.dtype) -> Attack:
    return _tensors(lambda t, n: t.update({n[0]: t[n[0]].to(dtype)}), "found dtype")


def _duplicated(raw: bytes) -> bytes:
    header, data = split(raw)
    text = json.dumps(header)
    name = next(iter(header))
    return with_header(f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'.encode(), data)


def _duplicated_inside(raw: bytes) -> bytes:
    header, data = split(raw)
    return with_header(json.dumps(header).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1).encode(), data)


CONTENTS: Attacks = {
    "empty": _bytes(lambda raw: b"", "found an empty file"),
    "a Git LFS pointer": _bytes(lambda raw: LFS, "found a Git LFS pointer", "git lfs pull"),
    "a Git LFS pointer of old": _bytes(lambda raw: LFS.replace(b"git-lfs.github", b"hawser.github"), "Git LFS pointer"),
    "a Git LFS pointer with a BOM": _bytes(lambda raw: b"\xef\xbb\xbf" + LFS, "found a Git LFS pointer"),
    "HTML": _bytes(lambda raw: b"\n <!doctype HTML>\n<title>Sign in</title>", "found an HTML page"),
    "XML": _bytes(lambda raw: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "found XML"),
    "JSON": _bytes(lambda raw: b'{"error": "Repository not found"}', "found JSON (", "download the file itself"),
    "a configuration": _bytes(lambda raw: good.config(), "are 'config' and 'weights' swapped"),
    "a download's error": _bytes(lambda raw: b"Entry not found", "found text ('Entry not found')"),
    "a hostile text": _bytes(lambda raw: b"a\x1b[2J\n  - forged"),
    "GGUF": _bytes(lambda raw: b"GGUF\3\0\0\0" + bytes(100), "found a GGUF file"),
    "gzip": _bytes(gzip.compress, "found gzip data"),
    "an adapter's archive": _bytes(lambda raw: good.zipped({"a": raw}), "found a zip", "as 'file'"),
    "seven bytes": _bytes(lambda raw: raw[:7]),
    "only a length": _bytes(lambda raw: raw[:8]),
    "cut in the header": _bytes(lambda raw: raw[:40], "found 40 of the", "it was cut off"),
    "cut in the data": _bytes(lambda raw: raw[:-1], "it was cut off", "file not fully covered"),
    "half": _bytes(lambda raw: raw[: len(raw) // 2], "it was cut off: download or copy it again"),
    "one byte more": _bytes(lambda raw: raw + b"\0", "bytes follow its data", "file not fully covered"),
    "a zip behind the data": _bytes(lambda raw: raw + good.zipped({"a": b"b"}), "file not fully covered"),
    "header of 2^63 bytes": _bytes(lambda raw: struct.pack("<Q", 2**63) + raw[8:]),
    "header of 2^64 - 1 bytes": _bytes(lambda raw: b"\xff" * 8 + raw[8:]),
    "header of 2 MiB": replace(
        _bytes(lambda raw: with_header(b"{" + b" " * 2 * MIB + b"}", b""), "the header's length"), needs_bytes=4 * MIB
    ),
    "header of no bytes": _bytes(lambda raw: with_header(b"", raw), "invalid JSON in header"),
    "header that is a list": _bytes(lambda raw: with_header(b"[1]", b"")),
    "header that is no JSON": _bytes(lambda raw: with_header(b"{" * 64, b""), "invalid JSON in header"),
    "header that is no UTF-8": _bytes(lambda raw: with_header(b'{"\xff": 1}', b""), "invalid UTF-8 in header"),
    "header with a space first": _bytes(lambda raw: with_header(b" {}", b""), "does not begin"),
    "deep header": _bytes(lambda raw: with_header(b'{"a":' * 30_000 + b"}" * 30_000, b""), "recursion limit exceeded"),
    "header with NaN": _bytes(lambda raw: with_header(b'{"a": NaN}', b""), "invalid JSON in header"),
    "pickle": _bytes(
        lambda raw: b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "found a pickle"
    ),
    "old pickle": _bytes(lambda raw: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "found a pickle", "safetensors"),
    "torch zip": _bytes(lambda raw: good.zipped({"archive/data.pkl": b"\x80\x04."}), "found a pickle", "never opened"),
    "5,000 tensors": replace(_bytes(_many(5_000), "expected at most 4096"), needs_bytes=MIB),
    "20,000 tensors": replace(_bytes(_many(20_000), "the header's length"), needs_bytes=4 * MIB),
    "a million tensors": replace(_bytes(_many(1_000_000), "the header's length"), needs_bytes=80 * MIB),
    "duplicate tensor": _bytes(_duplicated, "duplicate key"),
    "duplicate key of a tensor": _bytes(_duplicated_inside, "duplicate field `dtype`"),
    "offsets of 2^40": _entry("data_offsets", [0, 2**40], "invalid shape, data type, or offset"),
    "offsets of 400 digits": _entry("data_offsets", [0, 10**400], "number out of range"),
    "offsets of 2^64": _entry("data_offsets", [2**64, 2**64 + 4], "invalid type"),
    "offsets backwards": _entry("data_offsets", [8, 0], "invalid offset"),
    "negative offsets": _entry("data_offsets", [-8, 8], "invalid value"),
    "three offsets": _entry("data_offsets", [0, 4, 8], "invalid length 3"),
    "offsets that are floats": _entry("data_offsets", [0.0, 8.0], "invalid type"),
    "offsets that are bools": _entry("data_offsets", [False, True], "invalid type"),
    "offsets that are strings": _entry("data_offsets", ["0", "8"], "invalid type"),
    "offsets that are null": _entry("data_offsets", None, "invalid type: null"),
    "overlap": _moved(-4, 0, "invalid offset"),
    "gap": _moved(4, 0, "invalid offset"),
    "one tensor inside another": _moved(-8, -8, "invalid offset"),
    "shape of another size": _entry("shape", [3, 3], "invalid shape"),
    "negative shape": _entry("shape", [-1, -4], "invalid value"),
    "shape that overflows": _entry("shape", [2**62, 2**62, 4], "overflow computing buffer size"),
    "shape that overflows to nothing": _entry("shape", [2**32, 2**32], "overflow computing buffer size"),
    "shape of 400 digits": _entry("shape", [10**400], "number out of range"),
    "shape of 1,000 dimensions": _entry("shape", [1] * 1000, "invalid shape"),
    "shape that is a number": _entry("shape", 4, "invalid type"),
    "shape of floats": _entry("shape", [4.0], "invalid type"),
    "unknown dtype": _entry("dtype", "F37", "F37"),
    "dtype that is a list": _entry("dtype", ["F32"], "invalid type"),
    "one key more": _entry("stride", [1], "expected an object of dtype, shape and data_offsets"),
    "entry that is a list": _header(
        lambda h, n: h.update({n[0]: list(h[n[0]].values())}), "expected an object of dtype, shape and data_offsets"
    ),
    "dtype that is an object": _entry("dtype", {"F32": None}, "expected an object of dtype, shape and data_offsets"),
    "duplicate metadata": _bytes(
        lambda raw: with_header(
            json.dumps(split(raw)[0])[:-1].encode() + b', "__metadata__": {"a": "b", "a": "c"}}', split(raw)[1]
        ),
        "duplicate key 'a'",
    ),
    "metadata that is null": _header(lambda h, n: h.update(__metadata__=None), "expected an object of strings"),
    "tensor of 60 dimensions": _tensors(lambda t, n: t.update({n[0]: torch.zeros([1] * 60)}), "found shape [1, 1"),
    "entry that is a string": _header(lambda h, n: h.update({n[0]: "F32"}), "expected struct TensorInfo"),
    "metadata of numbers": _header(lambda h, n: h.update(__metadata__={"a": 1}), "expected a string"),
    "metadata that is a list": _header(lambda h, n: h.update(__metadata__=[]), "expected a map"),
    "metadata of 17 KiB": _sent(lambda s: save(good.tensors(s.base), {"a": "x" * 17_000}), "__metadata__: found 17001"),
    "no tensors": _sent(lambda s: save({}), "missing, expected shape"),
    "a tensor less": _tensors(lambda t, n: t.pop(n[0]), "missing, expected shape"),
    "a tensor more": _tensors(lambda t, n: t.update(bias=torch.zeros(1)), "bias: this tensor is not part"),
    "a layer too many": _tensors(
        lambda t, n: t.update({"layers.9999.router": t[n[0]].clone()}), "layers.9999.router: this tensor is not part"
    ),
    "a path as a name": _tensors(lambda t, n: t.update({"../../etc/passwd": torch.zeros(1)}), "../../etc/passwd: this"),
    "a name with a newline": _tensors(lambda t, n: t.update({"a\n  - forged": torch.zeros(1)}), "not part"),
    "a name of 50,000 characters": _tensors(lambda t, n: t.update({"x" * 50_000: torch.zeros(1)}), "not part"),
    "another shape": _tensors(lambda t, n: t.update({n[0]: torch.zeros(3, 3)}), "found shape [3, 3]"),
    "flat": _tensors(lambda t, n: t.update({n[0]: t[n[0]].flatten()}), "found shape"),
    "a scalar": _tensors(lambda t, n: t.update({n[0]: torch.tensor(1.0)}), "found shape []"),
    "float64": _dtype(torch.float64),
    "int8": _dtype(torch.int8),
    "bool": _dtype(torch.bool),
    "float8": _dtype(torch.float8_e4m3fn),
    "NaN": _value(float("nan"), "1 of", "are not finite"),
    "infinity": _value(float("inf"), "1 of", "are not finite"),
    "minus infinity": _value(float("-inf"), "1 of", "are not finite"),
    "all NaN": _tensors(lambda t, n: [x.fill_(float("nan")) for x in t.values()], *["are not finite"]),
    "overflow after scale": _tensors(lambda t, n: [x.fill_(3e38) for x in t.values()], "overflow the model's dtype"),
}
ATTACKS: Attacks = {f"weights: {kind}": attack for kind, attack in CONTENTS.items()}
