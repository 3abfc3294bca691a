"""Owns FORMAT.md's identity as a client sees it: from the bytes it sends or receives, hashed as they pass.

Imports no torch, so that a command starts at once.
"""

import io
import json
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from perft.config import AdapterConfig


def content_digest(config: bytes, weights_hash: bytes) -> str | None:
    """The digest of an adapter with that `adapter_config.json`; None if the file is none that has one.

    weights_hash: sha256 of `adapter_model.safetensors`, as raw bytes.
    """
    try:
        values = json.loads(config)
        is_lora = isinstance(values, dict) and values.get("peft_type") == "LORA"
        identity = config if is_lora else AdapterConfig.model_validate(values).canonical_json()
    except (ValueError, ValidationError, RecursionError):
        return None
    return sha256(sha256(identity).digest() + weights_hash).hexdigest()


class HashedFile(io.FileIO):
    """A file opened for reading that hashes what is read from its beginning on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._hash = sha256()

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size if size is not None else -1)
        self._hash.update(block)
        return block

    def seek(self, position: int, whence: int = 0, /) -> int:
        """Only to the beginning, where the hash starts anew."""
        assert position == 0 and whence == 0, "a hash cannot be taken out of order"
        self._hash = sha256()
        return super().seek(position)

    def digest(self) -> bytes:
        """sha256 of what was read."""
        return self._hash.digest()
