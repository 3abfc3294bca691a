"""Adapter folders with random weights, made from a configuration and a base's shape alone (no model is loaded)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from perft.base_model import BaseShape
from perft.config import AdapterConfig

RANDOM_R: dict[str, Any] = {
    "base_model_name_or_path": "synthetic", "variant": "R", "expert_type": "lora", "bottleneck": 16, "alpha": 32.0,
    "num_experts": 4, "top_k": 2, "renormalize": True,
}  # fmt: skip


def write_adapter(folder: Path, base: BaseShape, seed: int, values: dict[str, Any] = RANDOM_R) -> Path:
    """Write a random adapter of configuration `values`; the delta is small beside the block's own output."""
    config = AdapterConfig.model_validate(values)
    generator = torch.Generator().manual_seed(seed)
    shapes = config.tensor_shapes(config.layer_indices(base.moe_layers), base.hidden_size)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.1 if name.endswith("up_proj") else 1.0) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config.file_json())
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
