"""Owns an adapter's identity (docs/format.md): one digest of what its configuration means and of its weights' bytes.

Invariant: two adapters of equal digest compute the same. Nothing here needs torch, so a command starts at once.
"""

import io
import json
from collections.abc import Callable
from hashlib import file_digest, sha256
from pathlib import Path

from adapters.format.config import parse_config
from adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from adapters.format.recognize import BOM


def digest_of(meaning: bytes, weights_hash: bytes) -> str:
    """sha256(sha256(C) + sha256(W)) as 64 hex digits.

    meaning: C, see `canonical_config`. weights_hash: sha256 of the weights file, as raw bytes.
    """
    return sha256(sha256(meaning).digest() + weights_hash).hexdigest()


def canonical_config(raw: bytes) -> bytes | None:
    """What of an `adapter_config.json` the digest depends on; None if it is not a valid configuration.

    A PEFT LoRA configuration (checked elsewhere) counts as it is, byte by byte, without a byte order mark.
    """
    if peft_type_of(raw) == "LORA":
        return raw.removeprefix(BOM)
    config, violations = parse_config(raw)
    return None if config is None or violations else config.canonical_json()


def content_digest(raw: bytes, weights_hash: bytes) -> str | None:
    """The digest of an adapter with that `adapter_config.json`; None if the file is not a valid configuration."""
    meaning = canonical_config(raw)
    return None if meaning is None else digest_of(meaning, weights_hash)


def lora_digest(folder: Path) -> str:
    """The digest of the PEFT LoRA adapter in `folder`."""
    return digest_of(config_bytes(folder), file_hash(folder / WEIGHTS_FILE))


def config_bytes(folder: Path) -> bytes:
    """The `adapter_config.json` in `folder`, cut off one byte behind the largest size allowed."""
    with (folder / CONFIG_FILE).open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def file_hash(path: Path) -> bytes:
    """sha256 of a file, as raw bytes."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()


def peft_type_of(raw: bytes) -> object:
    """The `peft_type` of an `adapter_config.json`; None if the file has none or cannot be read as JSON."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return values.get("peft_type") if isinstance(values, dict) else None


class HashedFile(io.FileIO):
    """A file opened for reading that hashes what is read from its beginning on. seen: takes each block's bytes."""

    def __init__(self, path: Path, seen: Callable[[int], object] = lambda count: None) -> None:
        super().__init__(path, "rb")
        self._hash, self._seen = sha256(), seen

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size if size is not None else -1)
        self._hash.update(block)
        self._seen(len(block))
        return block

    def seek(self, position: int, whence: int = 0, /) -> int:
        """Only to the beginning, where the hash starts anew."""
        assert position == 0 and whence == 0, "a hash cannot be taken out of order"
        self._hash = sha256()
        return super().seek(position)

    def digest(self) -> bytes:
        """sha256 of what was read."""
        return self._hash.digest()
