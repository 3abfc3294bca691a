"""Tiny adapters for the tests of the store, and what a store is compared by."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.format.folder import read_folder
from adapters.identity import lora_digest
from adapters.store import UNCHANGED, AdapterRecord, Keys, Store, VersionRecord
from perft.base_model import BaseShape
from tests.synthetic import write_adapter

BASE = BaseShape(hidden_size=8, num_layers=1, moe_layers=(0,), num_experts=4, top_k=2, dtype=torch.float32)
SMALLEST: dict[str, Any] = {
    "base_model_name_or_path": "tiny", "variant": "S", "expert_type": "parallel", "bottleneck": 1, "num_experts": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Content:
    """The bytes of an adapter's two files, and its digest."""

    kind: Literal["PERFT", "LORA"]
    config: bytes
    weights: bytes
    digest: str

    @property
    def size(self) -> int:
        return len(self.config) + len(self.weights)

    def write(self, folder: Path) -> Path:
        (folder / CONFIG_FILE).write_bytes(self.config)
        (folder / WEIGHTS_FILE).write_bytes(self.weights)
        return folder


@cache
def perft(seed: int, description: str | None = None) -> Content:
    """Contents of one seed have one digest, whatever their description."""
    values = SMALLEST if description is None else SMALLEST | {"description": description}
    with TemporaryDirectory() as name:
        folder = write_adapter(Path(name), BASE, seed, values)
        digest = read_folder(folder, BASE).digest
        return Content("PERFT", (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes(), digest)


@cache
def lora(config: bytes = b'{"peft_type": "LORA"}\r\n', weights: bytes = b"weights") -> Content:
    """The store does not look into a PEFT LoRA adapter."""
    with TemporaryDirectory() as name:
        folder = Content("LORA", config, weights, "").write(Path(name))
        return Content("LORA", config, weights, lora_digest(folder))


def upload(
    store: Store, name: str, content: Content, activate: bool = True, allowed_keys: Keys = UNCHANGED
) -> tuple[AdapterRecord, VersionRecord, bool]:
    """Stage the content, add it, and let go of the staged folder, as a route does."""
    staged = store.stage()
    try:
        folder = content.write(staged)
        return store.add(name, folder, content.digest, content.kind, activate=activate, allowed_keys=allowed_keys)
    finally:
        store.discard(staged)


def remove(store: Store, name: str, version: int | None = None) -> None:
    """Delete a version or a name to the end."""
    draining = [v.version for v in store.start_delete(name, version).versions if v.state == "draining"]
    for number in draining:
        store.finish_delete(name, number)


def table(store: Store) -> list[dict[str, Any]]:
    """Everything the store says, without the times at which it was made."""
    records = [record.model_dump() for record in store.adapters()]
    for record in records:
        for version in record["versions"]:
            del version["created"]
    return records


def bytes_of(folder: Path) -> int:
    """What the blobs in a store's folder really take."""
    return sum(path.stat().st_size for path in (folder / "blobs").rglob("*") if path.is_file())
