"""Owns the checks of `adapter_model.safetensors`: which tensors, which shapes and types, only finite values.

Invariant: the safetensors library sees only files whose header `weights_header` found sound, and what is looked at is
mapped from the file, a block at a time: a file is never held in memory, however large.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapters.format.header import header_problems
from perft.base_model import BaseShape
from perft.config import AdapterConfig

MAX_METADATA_BYTES = 16 * 1024
BLOCK_VALUES = 4 * 1024 * 1024
SHOWN_PROBLEMS = 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights_violations(path: Path, config: AdapterConfig | None, base: BaseShape | None) -> list[str]:
    """Every violation in the weights file at `path`.

    Without a sound `config` or a known `base`, what depends on them is left out.
    """
    try:
        if problems := header_problems(path):
            return [unreadable(problems)]
        with safe_open(path, framework="pt") as file:
            found = metadata_violations(file.metadata())
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            found += _dtype_violations(dtypes)
            if config is not None and base is not None:
                found += _shape_violations(shapes, config.tensor_shapes(_layers(config, base), base.hidden_size))
            dtype = None if base is None else base.dtype
            for name in names:
                if dtypes[name] in DTYPES:
                    scale = config.scale if config is not None and name.endswith("up_proj") else 1.0
                    found += value_violations(name, file.get_tensor(name), dtype, scale)
            return found
    except (SafetensorError, OSError, ValueError) as error:
        return [unreadable([str(error)])]


def shape_violations(path: Path, config: AdapterConfig, base: BaseShape) -> list[str]:
    """How the tensors of a file that was checked for another base differ from what this one takes: the header alone."""
    try:
        if problems := header_problems(path):
            return [unreadable(problems)]
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return [unreadable([str(error)])]
    return _shape_violations(shapes, config.tensor_shapes(_layers(config, base), base.hidden_size))


def unreadable(problems: list[str]) -> str:
    """One violation for a file that is no sound safetensors file, whatever the number of reasons."""
    listed = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return f"adapter_model.safetensors: not a readable safetensors file ({listed}{f'; and {more} more' * (more > 0)})"


def _layers(config: AdapterConfig, base: BaseShape) -> tuple[int, ...]:
    """The layers to expect tensors for: those of the adapter that the base has as MoE layers."""
    return tuple(layer for layer in config.layer_indices(base.moe_layers) if layer in base.moe_layers)


def metadata_violations(metadata: dict[str, str] | None) -> list[str]:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in (metadata or {}).items())
    if size <= MAX_METADATA_BYTES:
        return []
    return [f"__metadata__: found {size} bytes, expected at most {MAX_METADATA_BYTES}"]


def _dtype_violations(dtypes: dict[str, str]) -> list[str]:
    return [
        f"{name}: found dtype {dtype}, expected one of {', '.join(DTYPES)}"
        for name, dtype in dtypes.items()
        if dtype not in DTYPES
    ]


def _shape_violations(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    found = [f"{name}: missing, expected shape {list(shape)}" for name, shape in expected.items() if name not in shapes]
    found += [
        f"{name[:120]}: this tensor is not part of the format here: remove it"
        for name in sorted(shapes.keys() - expected)
    ]
    found += [
        f"{name}: found shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return found


def value_violations(name: str, tensor: torch.Tensor, dtype: torch.dtype | None, scale: float) -> list[str]:
    """Non-finite values: as stored; after the cast to the model's dtype, if it is known; after the scale.

    Cast and scale keep the order of values, so a tensor's lowest and highest tell for all of it.
    """
    if not tensor.numel():
        return []
    blocks = torch.split(tensor.flatten(), BLOCK_VALUES)
    ends = torch.stack([end for block in blocks for end in torch.aminmax(block)])  # NaN where there is one
    if not torch.isfinite(ends).all():
        bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
        return [f"{name}: {bad} of {tensor.numel()} values are not finite (NaN or infinity)"]
    if dtype is None:
        return []
    served = ends.to(dtype)
    if not torch.isfinite(served).all():
        largest = float(ends.abs().max())
        return [f"{name}: values up to {largest:.3g} overflow the model's dtype {dtype}"]
    if not torch.isfinite(served * scale).all():
        return [f"{name}: values times scale {scale:.6g} overflow the model's dtype {dtype}"]
    return []
