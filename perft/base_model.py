"""Owns what an adapter has to fit: the few facts about a base model on which docs/format.md's rules depend."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from perft.config import AdapterConfig


@dataclass(frozen=True)
class BaseShape:
    """The shape of a Mixture-of-Experts base model.

    embedded_problem: why PERFT-E cannot be served on it; None if it can. slot_problem: the same of PERFT-R with
    gate_weight "base_slot". output_scale: what the model multiplies the
    sum of its experts' outputs by, after they ran (routed_scaling_factor). max_columns, max_routed_experts: the largest
    M * B, and M of variant R, that the operator serves here; None: any.
    """

    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    dtype: torch.dtype
    fingerprint: str | None = None
    embedded_problem: str | None = None
    slot_problem: str | None = None
    output_scale: float = 1.0
    max_columns: int | None = None
    max_routed_experts: int | None = None


def base_fingerprint(router_weights: Iterable[torch.Tensor]) -> str:
    """sha256 of the MoE router weights [N, D] as little-endian float32 bytes, layer after layer (docs/format.md)."""
    digest = sha256()
    for weight in router_weights:
        digest.update(weight.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def base_of_config(config: Any, dtype: torch.dtype) -> BaseShape | None:
    """The base described by a Hugging Face model config; None for an unknown architecture.

    config: a `transformers` config object of OLMoE, Mixtral or Qwen3-MoE.
    """
    count = int(config.num_hidden_layers) if hasattr(config, "num_hidden_layers") else 0
    layers = range(count)
    if config.model_type == "mixtral":
        moe_layers, num_experts = tuple(layers), config.num_local_experts
    elif config.model_type == "olmoe":
        moe_layers, num_experts = tuple(layers), config.num_experts
    elif config.model_type == "qwen3_moe":
        sparse = [i for i in layers if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0]
        moe_layers, num_experts = tuple(sparse), config.num_experts
    else:
        return None
    return BaseShape(config.hidden_size, count, moe_layers, num_experts, config.num_experts_per_tok, dtype)


def fit_violations(config: AdapterConfig, base: BaseShape, allow_other_base: bool = False) -> list[str]:
    """Every way in which a valid configuration does not fit a base (docs/format.md)."""
    found: list[str] = []
    if config.variant == "E" and config.num_experts != base.num_experts:
        found.append(
            f"num_experts: found {config.num_experts}, expected {base.num_experts}: variant 'E' has one per base expert"
        )
    if config.variant == "E" and base.embedded_problem:
        found.append(f"variant: found 'E', which is not served on this base: {base.embedded_problem}")
    if config.gate_weight == "base_slot" and config.top_k is not None and config.top_k > base.top_k:
        found.append(f"top_k: found {config.top_k}, 'base_slot' needs at most the base's top-k {base.top_k}")
    if config.gate_weight == "base_slot" and base.slot_problem:
        found.append(f"gate_weight: found 'base_slot', which is not served on this base: {base.slot_problem}")
    columns = config.num_experts * config.bottleneck
    if base.max_columns is not None and columns > base.max_columns:
        found.append(
            f"bottleneck: found {config.num_experts} experts of {config.bottleneck}, {columns} columns in all, "
            f"expected at most {base.max_columns} on this device"
        )
    if config.is_routed and base.max_routed_experts is not None and config.num_experts > base.max_routed_experts:
        found.append(
            f"num_experts: found {config.num_experts}, expected at most {base.max_routed_experts} on this device"
        )
    for layer in config.layers or ():
        if layer >= base.num_layers:
            found.append(f"layers: found {layer}, the base has layers 0 to {base.num_layers - 1}")
        elif layer not in base.moe_layers:
            found.append(f"layers: found {layer}, which is not an MoE layer of the base")
    mine, served = config.base_fingerprint, base.fingerprint
    if mine is not None and served is not None and mine.lower() != served and not allow_other_base:
        found.append(
            f"base_fingerprint: found {mine}, expected {served} of the served base: the adapter was trained on another"
        )
    return found
