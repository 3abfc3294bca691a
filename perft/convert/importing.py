"""Owns `perft import`: a checkpoint of the authors becomes a folder of docs/format.md that computes the same.

The published OLMoE code weights PERFT-R's experts by the base router's largest probabilities (docs/method.md, "The
published OLMoE code"), so that such a checkpoint becomes one with gate_weight "base_slot".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig, ExpertType, GateWeight
from perft.convert.checkpoint import Checkpoint
from perft.convert.layout import Kind, Part, Place
from perft.errors import InputError

PREFIX: dict[Kind, str] = {
    "shared": "shared_adapter", "routed": "shared_routing_adapter", "embedded": "embedded_routing_adapter",
}  # fmt: skip
TYPES: dict[str, ExpertType] = {"LoRA": "lora", "Parallel_Adapter": "parallel"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}


@dataclass(frozen=True)
class Given:
    """What the checkpoint does not say, or says wrongly. model_type: of the base ("olmoe", "mixtral", ...).
    renormalizes: whether the base divides the weights of its selected experts by their sum."""

    base_name: str
    model_type: str
    renormalizes: bool
    fingerprint: str | None = None
    alpha: float | None = None
    top_k: int | None = None
    gate_weight: GateWeight | None = None
    description: str | None = None


def converted(checkpoint: Checkpoint, base: BaseShape, given: Given) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of docs/format.md. Raises InputError with every problem."""
    kind = _kind(checkpoint)
    by_place = dict(checkpoint.tensors)
    layers = tuple(sorted({place.layer for place in by_place}))
    experts = 1 + max((place.expert for place in by_place), default=0)
    expert_type = _expert_type(checkpoint, kind)
    size = next(tensor for place, tensor in by_place.items() if place.part == "down").shape[0]
    values: dict[str, Any] = {
        "base_model_name_or_path": given.base_name, "base_fingerprint": given.fingerprint,
        "variant": _variant(kind, experts), "expert_type": expert_type, "bottleneck": size, "num_experts": experts,
        "layers": None if layers == base.moe_layers else layers, "description": given.description,
    }  # fmt: skip
    values |= _expert_values(checkpoint.config, kind, expert_type, size, given)
    if kind == "routed":
        values |= _routing_values(checkpoint.config, experts, given)
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise InputError("the checkpoint describes no adapter that can be", _problems(error)) from None
    problems = [*fit_violations(config.model_copy(update={"base_fingerprint": None}), base), *_lacking(layers, base)]
    expected = config.tensor_shapes(config.layer_indices(base.moe_layers), base.hidden_size)
    tensors = _stacked(by_place, kind, expert_type, config, layers, problems)
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"{name}: found the shape {list(tensors[name].shape)}, expected {list(shape)} on this base")
    problems += [f"{name}: found values that are not finite" for name, each in tensors.items() if not _is_finite(each)]
    if problems:
        raise InputError(f"the checkpoint does not fit {given.base_name}", problems)
    return config, tensors


def _kind(checkpoint: Checkpoint) -> Kind:
    kinds = sorted({place.kind for place in checkpoint.tensors})
    if len(kinds) > 1:
        raise InputError(
            f"the checkpoint holds {len(kinds)} adapters at once ({', '.join(PREFIX[kind] for kind in kinds)}), and an "
            "adapter of our format is one of them: train them apart"
        )
    return kinds[0]


def _expert_type(checkpoint: Checkpoint, kind: Kind) -> ExpertType:
    types = {place.expert_type for place in checkpoint.tensors if place.expert_type is not None}
    if len(types) != 1:
        raise InputError("found LoRA and parallel experts in one checkpoint, expected one kind")
    (found,) = types
    named = checkpoint.config.get(f"{PREFIX[kind]}_type")
    if named is not None and TYPES.get(named) != found:
        raise InputError(f"config.json says {PREFIX[kind]}_type {named!r}, and the tensors are of {found} experts")
    return found


def _variant(kind: Kind, experts: int) -> str:
    if kind == "shared":
        return "S" if experts == 1 else "D"
    return "R" if kind == "routed" else "E"


def _expert_values(
    config: Mapping[str, Any], kind: Kind, expert_type: ExpertType, size: int, given: Given
) -> dict[str, Any]:
    """alpha or activation, from the checkpoint's own arguments."""
    arguments = config.get(f"{PREFIX[kind]}_args") or config
    key = "r" if expert_type == "lora" else "hidden_dim"
    if arguments.get(key, size) != size:
        raise InputError(f"config.json says {key} {arguments[key]}, and the tensors have {size}")
    if expert_type == "parallel":
        named = arguments.get("hidden_act", "silu")
        if named not in ACTIVATIONS:
            raise InputError(f"found the activation {named!r}, expected one of {', '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[named]}
    alpha = given.alpha if given.alpha is not None else arguments.get("lora_alpha")
    if alpha is None:
        raise InputError("the checkpoint does not say its lora_alpha: give it with --alpha (scale = alpha / r)")
    return {"alpha": float(alpha)}


def _routing_values(config: Mapping[str, Any], experts: int, given: Given) -> dict[str, Any]:
    """top_k, gate_weight and renormalize of PERFT-R."""
    said = config.get("shared_routing_adapter_num_experts", experts)
    if said != experts:
        raise InputError(f"config.json says {said} experts, and the tensors are of {experts}")
    top_k = given.top_k or config.get("shared_routing_adapter_num_experts_per_tok")
    if top_k is None:
        raise InputError("the checkpoint does not say how many experts a token uses: give it with --top-k")
    gate_weight = given.gate_weight or ("base_slot" if given.model_type == "olmoe" else "adapter")
    renormalize = gate_weight == "adapter" and given.renormalizes
    return {"top_k": top_k, "gate_weight": gate_weight, "renormalize": renormalize}


def _lacking(layers: tuple[int, ...], base: BaseShape) -> list[str]:
    """The authors' adapters are in every MoE layer."""
    return [
        f"layer {layer}: found no tensor, expected those of every MoE layer of the base"
        for layer in base.moe_layers
        if layer not in layers
    ]


def _stacked(
    tensors: Mapping[Place, torch.Tensor], kind: Kind, expert_type: ExpertType, config: AdapterConfig,
    layers: tuple[int, ...], problems: list[str],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors over all experts, layer after layer; what is missing becomes a problem."""
    named: dict[str, torch.Tensor] = {}
    parts: tuple[tuple[Part, str], ...] = (("down", "down_proj"), ("up", "up_proj"))
    for layer in layers:
        if config.is_routed:
            router = tensors.get(Place(kind, layer, "router"))
            if router is None:
                problems.append(f"layer {layer}: found no router (shared_routing_adapter_gate)")
            else:
                named[f"layers.{layer}.router"] = router.contiguous()
        for part, name in parts:
            found = [tensors.get(Place(kind, layer, part, m, expert_type)) for m in range(config.num_experts)]
            missing = [m for m, tensor in enumerate(found) if tensor is None]
            problems += [f"layer {layer}: found no {name} of expert {m}" for m in missing]
            present = [tensor for tensor in found if tensor is not None]
            if len({tuple(tensor.shape) for tensor in present}) > 1:
                problems.append(f"layer {layer}: the experts' {name} have different shapes")
            elif not missing:
                named[f"layers.{layer}.{name}"] = torch.stack(present)
    return named


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _problems(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors()]
