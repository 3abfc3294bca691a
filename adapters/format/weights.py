"""Owns the checks of `adapter_model.safetensors`: which tensors, which shapes and types, only finite values."""

from collections.abc import Mapping
from pathlib import Path

from adapters.format.header import Header, UnreadableWeightsError, opened
from adapters.format.strict_json import quote
from adapters.format.values import DTYPES, read_values
from perft.base_model import BaseShape
from perft.config import AdapterConfig

MAX_METADATA_BYTES = 16 * 1024
Shape = tuple[int, ...]


def check_weights(path: Path, config: AdapterConfig | None, base: BaseShape | None) -> tuple[list[str], bytes]:
    """Read the weights file at `path` once: every violation in it, and its sha256 as raw bytes.

    Without a sound `config` or a known `base`, what depends on them is left out. The hash of a file that is not a
    safetensors file is empty.
    """
    try:
        with opened(path) as (file, header):
            found = metadata_violations(header) + dtype_violations(header)
            if config is not None and base is not None:
                found += shape_violations(header.shapes, config, base)
            scale = 1.0 if config is None else config.scale
            scales = {name: scale if name.endswith("up_proj") else 1.0 for name in header.shapes}
            values, weights_hash = read_values(file, header, scales, None if base is None else base.dtype)
            return found + values, weights_hash
    except UnreadableWeightsError as error:
        return [str(error)], b""


def header_violations(path: Path, config: AdapterConfig, base: BaseShape) -> list[str]:
    """How the tensors of a file that was checked for another base differ from what this one takes: the header alone."""
    try:
        with opened(path) as (_, header):
            return shape_violations(header.shapes, config, base)
    except UnreadableWeightsError as error:
        return [str(error)]


def shape_violations(shapes: Mapping[str, Shape], config: AdapterConfig, base: BaseShape) -> list[str]:
    """How tensors of these shapes differ from those that the adapter has on this base."""
    layers = tuple(layer for layer in config.layer_indices(base.moe_layers) if layer in base.moe_layers)
    expected = config.tensor_shapes(layers, base.hidden_size)
    found = [f"{name}: missing, expected shape {list(shape)}" for name, shape in expected.items() if name not in shapes]
    found += [
        f"{name[:120]}: this tensor is not part of the format here: remove it"
        for name in sorted(shapes.keys() - expected)
    ]
    found += [
        f"{name}: found shape {quote(list(shapes[name]))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return found


def metadata_violations(header: Header) -> list[str]:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in header.metadata.items())
    if size <= MAX_METADATA_BYTES:
        return []
    return [f"__metadata__: found {size} bytes, expected at most {MAX_METADATA_BYTES}"]


def dtype_violations(header: Header) -> list[str]:
    return [
        f"{tensor.name}: found dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}"
        for tensor in header.tensors
        if tensor.dtype not in DTYPES
    ]
