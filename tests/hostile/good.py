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
TRAINERS = (
    "README.md", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "random_states_0.pkl", "optimizer.bin",
    "trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "merges.txt", "vocab.json", "chat_template.jinja", "zero_to_fp32.py", "latest", ".gitattributes",
    f"runs/{'Nov25_' * 20}/events.out.tfevents.{'1' * 90}.0", "global_step5/mp_rank_00_model_states.pt",
    "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip
"""What a trainer leaves beside an adapter's files in a checkpoint."""
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


def zipped(members: dict[str, bytes], comment: bytes = b"") -> bytes:
    """A .zip as Python's own library makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    return buffer.getvalue()


def tarred(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A .tar.gz as Python's own library makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def good_uploads(setting: Setting) -> dict[str, Upload]:
    """Uploads that must be taken."""
    config_bytes, weights_bytes = files(setting).values()
    both, readme = files(setting), {"README.md": b"read me"}
    poet = {f"poet/{name}": data for name, data in both.items()}
    mac = {f"__MACOSX/poet/._{name}": b"\0\5\x16\7" for name in both} | {"poet/.DS_Store": b"\0\0\0\1Bud1"}
    windows = {"poet/Thumbs.db": b"\xd0\xcf", "poet/desktop.ini": b"[x]"}
    deep = {f"out/checkpoint-5/adapter/{name}": data for name, data in both.items()}
    trainers = {f"out/{name}": b"x" * 50 for name in TRAINERS}
    pickles = dict.fromkeys(
        ("adapter_model.bin", "old/adapter_model.pt", "Pytorch_Model.BIN"), b"\x80\x02cos\nsystem\n"
    )
    marked = b"\xef\xbb\xbf" + config_bytes
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
        "zip of a folder": archived(zipped({"poet/": b""} | poet)),
        "tar.gz of a folder": archived(tarred({"./poet/": b""} | {f"./{name}": data for name, data in poet.items()})),
        "zip of folders in folders": archived(zipped(deep)),
        "tar.gz of folders in folders": archived(tarred(deep)),
        "zip of a Mac": archived(zipped(poet | mac)),
        "tar.gz of a Mac": archived(tarred({f"._{name}": b"\0\5" for name in both} | both)),
        "zip of Windows": archived(zipped(windows | poet)),
        "zip with a comment": archived(zipped(both, b"packed by hand")),
        "zip with a comment of 65,535 bytes": archived(zipped(both, b"PK\1\2" + b"x" * 65_531)),
        "zip of a checkpoint": archived(zipped(trainers | {f"out/{name}": data for name, data in both.items()})),
        "tar.gz of a checkpoint": archived(tarred(trainers | {f"out/{name}": data for name, data in both.items()})),
        "tar.gz of a checkpoint, GNU": archived(tarred(trainers | deep, tarfile.GNU_FORMAT)),
        "zip of a thousand members": archived(zipped(both | {f"runs/{i}": b"" for i in range(1000)})),
        "tar.gz of a thousand members": archived(tarred(both | {f"runs/{i}": b"" for i in range(1000)})),
        "zip with pickles beside the weights": archived(zipped(pickles | both)),
        "tar.gz with pickles beside the weights": archived(tarred(both | pickles)),
        "config with a byte order mark": two_files(marked, weights_bytes),
        "zip of a config with a byte order mark": archived(zipped(both | {CONFIG_FILE: marked})),
        "byte by byte": Upload([bytes([byte]) for byte in form({"name": NAME, "file": zipped(files(setting))})]),
    }
