"""Owns an adapter's two files (docs/format.md) on the trainer's side: written whole or not at all, and read again."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from perft.config import FOR_PEOPLE, AdapterConfig
from perft.durable import sync
from perft.hf.adapter import PerftAdapter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save(adapter: PerftAdapter, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write docs/format.md's two files into `folder`, which is created if missing. Raises OSError.

    The configuration is put in place last: a folder that has both files has the whole adapter.
    """
    tensors = {name: tensor.cpu().to(dtype) for name, tensor in adapter.tensors().items()}
    write_folder(Path(folder), adapter.config, tensors)


def write_folder(folder: Path, config: AdapterConfig, tensors: dict[str, torch.Tensor]) -> None:
    """The same for any configuration and its tensors, by their names in docs/format.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".perft-", dir=folder) as unfinished:
        weights, described = Path(unfinished) / WEIGHTS_FILE, Path(unfinished) / CONFIG_FILE
        try:
            save_file(tensors, weights)
        except Exception as error:  # safetensors wraps the system's error in one of its own
            raise OSError(f"cannot write {folder / WEIGHTS_FILE}: {_reason(error, folder)}") from error
        weights.chmod(0o644)  # safetensors makes it readable only by its owner
        described.write_text(config.file_json(), encoding="utf-8")
        for file in (weights, described):
            sync(file)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(described, folder / CONFIG_FILE)
    sync(folder)


def read_config(folder: Path | str) -> AdapterConfig:
    """The configuration in a folder, for `attach`. Raises ValueError or OSError."""
    return AdapterConfig.model_validate_json((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))


def load(adapter: PerftAdapter, folder: Path | str) -> None:
    """Read the weights of a folder into an adapter of the same configuration. Raises ValueError or OSError."""
    folder = Path(folder)
    config, own = read_config(folder), dict(adapter.by_layer())
    if differing := [
        f"{key}: found {value!r}, expected {wanted!r}"
        for key, value in config
        if key not in FOR_PEOPLE and value != (wanted := getattr(adapter.config, key))
    ]:
        raise ValueError(f"{folder} holds an adapter of another configuration: {'; '.join(differing)}")
    found = load_file(folder / WEIGHTS_FILE)
    expected = {name: tensor.shape for name, tensor in adapter.tensors().items()}
    if {name: tensor.shape for name, tensor in found.items()} != expected:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not hold the tensors of its configuration")
    with torch.no_grad():
        for name, tensor in found.items():
            _, layer, part = name.split(".")
            own[int(layer)].get_parameter(part).copy_(tensor)


def _reason(error: Exception, folder: Path) -> str:
    """What the system said, without the wrapping."""
    free = shutil.disk_usage(folder).free
    return f"{error} ({free / 1e6:.0f} MB are free)"
