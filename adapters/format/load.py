"""Owns the tensors of an adapter that was checked, on their way to whoever computes with them."""

from pathlib import Path

from safetensors.torch import load_file

from adapters.errors import InvalidAdapterError
from adapters.format.files import WEIGHTS_FILE
from adapters.format.weights import shape_violations
from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.reference import LayerWeights


def load_layers(folder: Path, config: AdapterConfig, base: BaseShape) -> dict[int, LayerWeights]:
    """The tensors by decoder layer, cast to the model's dtype, on the CPU.

    Raises InvalidAdapterError if their names or shapes are not what the adapter has on this base: it was checked for
    another one.
    """
    stored = load_file(folder / WEIGHTS_FILE)
    if violations := shape_violations({name: tuple(tensor.shape) for name, tensor in stored.items()}, config, base):
        raise InvalidAdapterError(str(folder), violations)
    tensors = {name: tensor.to(base.dtype) for name, tensor in stored.items()}
    return {
        layer: LayerWeights(
            tensors.get(f"layers.{layer}.router"),
            tensors[f"layers.{layer}.down_proj"],
            tensors[f"layers.{layer}.up_proj"],
        )
        for layer in config.layer_indices(base.moe_layers)
    }
