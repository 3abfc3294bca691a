"""Owns a sound adapter to start from: attacks change one thing in it."""

import io
import json
import tarfile
import zipfile
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import save

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from tests.hostile.attack import Setting, Upload, form, whole

NAME = b"hostile"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def values(**changes: Any) -> dict[str, Any]:
    """A sound configuration, R of two experts, with `changes`."""
    return {
        "peft_type": "PERFT", "format_version": 1, "base_model_name_or_path": "tiny", "variant": "R",
        "expert_type": "lora", "bottleneck": 2, "alpha": 4.0, "num_experts": 2, "top_k": 1, "renormalize": True,
    } | changes  # fmt: skip


def config(**changes: Any) -> bytes:
    return json.dumps(values(**changes)).encode()


def tensors(base: BaseShape) -> Tensors:
    """The tensors that `values()` asks for on `base`; small random numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = AdapterConfig.model_validate(values()).tensor_shapes(base.moe_layers, base.hidden_size)
    return {name: torch.randn(shape, generator=generator) / 100 for name, shape in shapes.items()}


@lru_cache
def weights(base: BaseShape) -> bytes:
    return save(tensors(base))


def files(setting: Setting) -> dict[str, bytes]:
    """The two files of the sound adapter."""
    return {CONFIG_FILE: config(), WEIGHTS_FILE: weights(setting.base)}


def two_files(config_bytes: bytes, weights_bytes: bytes, name: bytes = NAME) -> Upload:
    """The form of `config` and `weights`."""
    return whole(form({"name": name, "config": config_bytes, "weights": weights_bytes}))


def archived(archive: bytes, name: bytes = NAME) -> Upload:
    """The form of `file`."""
    return whole(form({"name": name, "file": archive}))


def zipped(members: dict[str, bytes]) -> bytes:
    """A .zip as Python's own library makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    """A .tar.gz as Python's own library makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def good_uploads(setting: Setting) -> dict[str, Upload]:
    """Uploads that must be taken."""
    config_bytes, weights_bytes = files(setting).values()
    readme = {"README.md": b"read me"}
    prefixed = {f"./{name}": data for name, data in files(setting).items()}
    return {
        "two files": two_files(config_bytes, weights_bytes),
        "weights first": whole(form({"weights": weights_bytes, "config": config_bytes, "name": NAME})),
        "not activated": whole(
            form({"name": NAME, "activate": b"false", "config": config_bytes, "weights": weights_bytes})
        ),
        "zip": archived(zipped(files(setting))),
        "zip with a README": archived(zipped(files(setting) | readme)),
        "zip of ./": archived(zipped(prefixed)),
        "tar.gz": archived(tarred(files(setting))),
        "tar.gz of ./": archived(tarred(prefixed | readme)),
        "byte by byte": Upload([bytes([byte]) for byte in form({"name": NAME, "file": zipped(files(setting))})]),
    }
