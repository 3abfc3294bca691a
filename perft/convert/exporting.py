"""Owns `perft export`: a folder of docs/format.md becomes a checkpoint in the authors' layout, where that can say it.

Invariant: what is written computes the same under the authors' published code, or nothing is written.
"""

from collections.abc import Mapping
from typing import Any

import torch

from perft.config import AdapterConfig
from perft.convert.layout import BLOCKS, Kind, Place, written
from perft.convert.settings import PREFIX, TYPES
from perft.errors import InputError
from perft.reference import LayerWeights

KINDS: dict[str, Kind] = {"S": "shared", "D": "shared", "R": "routed", "E": "embedded"}


def exported(
    config: AdapterConfig,
    layers: Mapping[int, LayerWeights],
    model_type: str,
    moe_layers: tuple[int, ...],
    renormalizes: bool,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and the tensors. Raises InputError with every reason why the layout cannot say it."""
    problems = unsayable(config, model_type, moe_layers, renormalizes)
    if problems:
        raise InputError("the authors' layout cannot hold this adapter", problems)
    kind = KINDS[config.variant]
    tensors: dict[str, torch.Tensor] = {}
    for layer, weights in layers.items():
        if weights.router is not None:
            tensors[written(Place(kind, layer, "router"), model_type)] = _as_published(weights.router)
        for m in range(config.num_experts):
            for part, stacked in (("down", weights.down_proj), ("up", weights.up_proj)):
                place = Place(kind, layer, "down" if part == "down" else "up", m, config.expert_type)
                tensors[written(place, model_type)] = stacked[m].contiguous()
    return _config_json(config, kind, model_type), tensors


def unsayable(config: AdapterConfig, model_type: str, moe_layers: tuple[int, ...], renormalizes: bool) -> list[str]:
    """Every reason why the authors' code could not compute what this adapter does. renormalizes: the base."""
    if model_type not in BLOCKS:
        return [f"base: found {model_type}, and the authors' code knows {' and '.join(BLOCKS)}"]
    found: list[str] = []
    if config.layers is not None and config.layers != moe_layers:
        found.append("layers: found some of the base's MoE layers, and the authors' code has an adapter in every one")
    if model_type == "olmoe" and config.is_routed and config.gate_weight != "base_slot":
        found.append(
            "gate_weight: found 'adapter', and the published OLMoE code weights PERFT-R's experts by the base's router"
        )
    if model_type == "olmoe" and config.gate_weight == "base_slot" and renormalizes:
        found.append("gate_weight: found 'base_slot', and this base divides its weights by their sum (norm_topk_prob)")
    if model_type == "mixtral" and config.is_routed and not (config.gate_weight == "adapter" and config.renormalize):
        found.append("renormalize: the published Mixtral code always divides the selected weights by their sum")
    return found


def _config_json(config: AdapterConfig, kind: Kind, model_type: str) -> dict[str, Any]:
    prefix = PREFIX[kind]
    written_type = next(name for name, meant in TYPES.items() if meant == config.expert_type)
    arguments: dict[str, Any] = (
        {"r": config.bottleneck, "lora_alpha": _number(config.alpha), "lora_dropout": 0.05}
        if config.expert_type == "lora"
        else {"hidden_dim": config.bottleneck, "hidden_act": config.activation, "dropout": 0.05}
    )
    values: dict[str, Any] = {
        "model_type": f"{model_type}-adapter", "_name_or_path": config.base_model_name_or_path,
        "shared_adapter": kind == "shared", "shared_routing_adapter": kind == "routed",
        "embedded_routing_adapter": kind == "embedded", f"{prefix}_type": written_type, f"{prefix}_args": arguments,
    }  # fmt: skip
    if kind == "shared":
        values["shared_adapter_num"] = config.num_experts
    if kind == "routed":
        values["shared_routing_adapter_num_experts"] = config.num_experts
        values["shared_routing_adapter_num_experts_per_tok"] = config.top_k
    return values


def _as_published(router: torch.Tensor) -> torch.Tensor:
    """A router in bfloat16, as the authors have it, where that loses nothing."""
    rounded = router.bfloat16()
    return (rounded if torch.equal(rounded.to(router.dtype), router) else router).contiguous()


def _number(alpha: float | None) -> float | None:
    """12 for 12.0, as the authors write it."""
    return int(alpha) if alpha is not None and alpha.is_integer() else alpha
