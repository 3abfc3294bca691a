"""Owns PEFT LoRA adapters that do as much arithmetic as a PERFT adapter: the peer that vLLM serves by itself."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.inspection.figures import figures

MODULES = ("q_proj", "v_proj")


def features(base: Path) -> dict[str, tuple[int, int]]:
    """(features in, features out) of q_proj and v_proj, from the base's configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    return {module: (config.hidden_size, heads[module] * head) for module in MODULES}


def activated_parameters(shape: BaseShape, values: dict[str, Any]) -> int:
    """Parameters of a PERFT adapter that one token activates, over all layers (docs/method.md, "Parameters")."""
    return figures(AdapterConfig.model_validate(values), shape).activated


def equal_rank(base: Path, shape: BaseShape, values: dict[str, Any]) -> int:
    """The rank at which LoRA on q and v of every layer has as many parameters, to the nearest whole rank."""
    per_rank = shape.num_layers * sum(wide + high for wide, high in features(base).values())
    return max(1, round(activated_parameters(shape, values) / per_rank))


def slot_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that holds `rank`; vLLM pads every adapter to it."""
    return next(size for size in (8, 16, 32, 64, 128, 256) if size >= rank)


def write_lora(folder: Path, base: Path, shape: BaseShape, rank: int, seed: int) -> Path:
    """A random PEFT LoRA adapter on q and v of every layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_layers):
        for module, (wide, high) in features(base).items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, wide, generator=generator) / wide**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(high, rank, generator=generator) * 0.1 / rank**0.5
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "synthetic", "r": rank,
        "lora_alpha": 2 * rank, "target_modules": list(MODULES), "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
