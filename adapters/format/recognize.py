"""Owns recognizing what people hand in by mistake: a file of another kind, by its first bytes.

Invariant: nothing is opened, unpacked or parsed here, and a pickle least of all: only the bytes given are looked at.
"""

import re
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors write in front of a text."""

START_BYTES = 4096
"""How much of a file is enough to recognize it."""

SHOWN_CHARACTERS = 60

PICKLE = (
    "a pickle, as PyTorch's .bin and .pt files are, which can run code and is never opened here: convert it to "
    "safetensors (safetensors.torch.save_file, or save_pretrained of a current PEFT)"
)
TEXT = "such as a download's error, or a path that curl sends as it is without @ before it: send the file itself"
_LFS = re.compile(rb"version https?://[\w.-]+/spec/v")
_YAML = re.compile(rb"(?:\s*#[^\n]*\n)*\s*(?:---|%YAML|[A-Za-z_][\w-]*:(?:\s|$))")
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")
_MAGIC = (
    (b"PK\3\4", "zip", "a zip: an archive is sent as 'file'; PyTorch's .bin and .pt files are zips too, never opened"),
    (b"PK\5\6", "zip", "an empty zip"),
    (b"\x1f\x8b", "gzip", "gzip data: an archive is sent as 'file', any other file as it is, not compressed"),
    (b"\xfd7zXZ\0", "xz", "xz data: pack as .zip or .tar.gz"),
    (b"BZh", "bzip2", "bzip2 data: pack as .zip or .tar.gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd data: pack as .zip or .tar.gz"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "a .7z: pack as .zip or .tar.gz"),
    (b"Rar!", "rar", "a .rar: pack as .zip or .tar.gz"),
    (b"GGUF", "gguf", "a GGUF file of llama.cpp: send the safetensors file that it was made from"),
    (b"\x89HDF", "hdf5", "an HDF5 file: convert it to safetensors"),
    (b"\x93NUMPY", "numpy", "a NumPy file: convert it to safetensors"),
)


@dataclass(frozen=True)
class Recognized:
    """What a file is. kind: its stable short name. text: what it is and what to do, to follow "found"."""

    kind: str
    text: str


def recognized(start: bytes) -> Recognized | None:
    """What a file is that begins with `start` (all of it if it is short); None if that is not known."""
    if not start:
        return Recognized("empty", "an empty file: it was not written, or its download or copy did not finish")
    text = start.removeprefix(BOM).lstrip()
    if _LFS.match(text):
        return Recognized(
            "lfs", "a Git LFS pointer, not the file it stands for: run `git lfs pull` where it came from, then send it"
        )
    return _binary(start) or _text(text)


def _binary(start: bytes) -> Recognized | None:
    if start.startswith(b"PK\3\4") and b"data.pkl" in start[:400]:
        return Recognized("pickle", PICKLE)
    for magic, kind, told in _MAGIC:
        if start.startswith(magic):
            return Recognized(kind, told)
    if start[257:262] == b"ustar":
        return Recognized("tar", "a plain .tar: compress it (tar -czf adapter.tar.gz ...)")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return Recognized("safetensors", "a safetensors file, which belongs into 'weights': are the files swapped?")
    if start[:1] == b"\x80" and start[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5"):
        return Recognized("pickle", PICKLE)
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or _has_every_second_zero(start):
        name = "UTF-32" if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else "UTF-16"
        return Recognized("utf-16", f"text in {name}: save it as UTF-8")
    return None


def _has_every_second_zero(start: bytes) -> bool:
    """Whether this is ASCII text in UTF-16 without a byte order mark."""
    even, odd = start[:64:2], start[1:64:2]
    return len(odd) > 1 and any(
        not any(zeros) and _is_text(characters) for zeros, characters in ((even, odd), (odd, even))
    )


def _text(text: bytes) -> Recognized | None:
    """What a text is, without white space in front."""
    lowered = text[:32].lower()
    if lowered.startswith(_MARKUP):
        return Recognized("html", "an HTML page, such as a download's error or login page: download the file itself")
    if lowered.startswith(b"<"):
        return Recognized("xml", "XML, such as the error of a storage service: download the file itself")
    if text.startswith((b"{", b"[")) and _is_text(text):
        if b'"peft_type"' in text:
            return Recognized("json", "an adapter's configuration (JSON): are 'config' and 'weights' swapped?")
        return Recognized("json", f"JSON ({_shown(text)}), such as an API's error: download the file itself")
    if not text or not _is_text(text):
        return None
    if _YAML.match(text):
        return Recognized("yaml", f"YAML ({_shown(text)}): write the configuration as JSON")
    return Recognized("text", f"text ({_shown(text)}), {TEXT}")


def _is_text(data: bytes) -> bool:
    """Whether bytes, which may end inside a character, are text in UTF-8."""
    try:
        decoded = data[:START_BYTES].decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) - error.start > 3:
            return False
        decoded = data[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in decoded)


def _shown(text: bytes) -> str:
    """The first line, quoted and cut."""
    line = text.split(b"\n")[0].decode("utf-8", "replace").strip()
    return ascii(line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "...")
