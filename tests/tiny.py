"""Tiny random MoE models and adapters: distinct experts, top-k > 1, several layers, weights large enough to matter."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from perft.config import AdapterConfig
from perft.hf import PerftAdapter, attach, shape_of

VOCABULARY = 128
LAYERS = 4
KINDS = ("mixtral", "olmoe", "qwen3_moe")

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


def config_of(kind: str) -> Any:
    """A tiny Hugging Face config; each kind has its own number of experts and top-k."""
    if kind == "mixtral":
        return MixtralConfig(**_SHARED, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    if kind == "olmoe":
        return OlmoeConfig(**_SHARED, intermediate_size=96, num_experts=8, num_experts_per_tok=3)
    sparse = {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32}
    return Qwen3MoeConfig(**_SHARED, **sparse, intermediate_size=96, norm_topk_prob=True, mlp_only_layers=[3])


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model."""
    return write_random(config_of(kind), folder, seed)


def write_random(config: Any, folder: Path, seed: int = 0) -> Path:
    """Weights wide enough that routers and experts really differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "bias" not in name:
            is_wide = "embed" in name or name.endswith(("gate.weight", "router.weight"))
            torch.nn.init.normal_(parameter, std=1.0 if is_wide else 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """The Hugging Face model in float32, ready to run."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter_config(model: Any, variant: str, expert_type: str, **changes: Any) -> AdapterConfig:
    """A configuration of `variant` that fits `model`; `changes` override any key."""
    experts = shape_of(model).num_experts
    count = {"R": 4, "E": experts, "D": 3, "S": 1}[variant]
    values: dict[str, Any] = {
        "base_model_name_or_path": "tiny", "variant": variant, "expert_type": expert_type, "bottleneck": 5,
        "num_experts": count,
    }  # fmt: skip
    values |= {"alpha": 10.0} if expert_type == "lora" else {"activation": "silu"}
    values |= {"top_k": 2, "renormalize": True} if variant == "R" else {}
    return AdapterConfig.model_validate(values | changes)


def randomize(adapter: PerftAdapter, seed: int, strength: float = 1.0) -> PerftAdapter:
    """Random weights whose delta is of the size of the block's own output, so that tokens change."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapter.by_layer():
        for parameter in layer.parameters():
            fan_in = parameter.shape[-1]
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * strength * (2.0 if parameter is layer.router else 1.0) / fan_in**0.5
    return adapter


def every_variant() -> list[tuple[str, str, dict[str, Any]]]:
    """(variant, expert type, changes) of the cases the parity tests run through."""
    cases: list[tuple[str, str, dict[str, Any]]] = [(v, e, {}) for v, e in product("REDS", ("lora", "parallel"))]
    cases += [("R", "lora", {"renormalize": False}), ("R", "lora", {"renormalize": False, "gate_weight": "base_slot"})]
    cases += [("R", "parallel", {"renormalize": False, "gate_weight": "base_slot", "top_k": 1})]
    cases += [("D", "parallel", {"activation": "relu"}), ("E", "parallel", {"activation": "gelu", "layers": (0, 2)})]
    cases += [("S", "lora", {"layers": (1,), "bottleneck": 64}), ("R", "lora", {"bottleneck": 3, "num_experts": 7})]
    return cases


def attach_random(model: torch.nn.Module, case: tuple[str, str, dict[str, Any]], seed: int) -> PerftAdapter:
    variant, expert_type, changes = case
    return randomize(attach(model, adapter_config(model, variant, expert_type, **changes)), seed)
