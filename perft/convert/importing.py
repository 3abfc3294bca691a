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
from perft.convert.settings import (
    ACTIVATIONS,
    MOST_ALPHA,
    PREFIX,
    arguments_of,
    base_problems,
    shown,
    tensor_problems,
)  # fmt: skip
from perft.convert.weights import Entry, loaded
from perft.errors import InputError


@dataclass(frozen=True)
class Given:
    """What the checkpoint does not say. model_type: of the base ("olmoe", "mixtral", ...). renormalizes: whether the
    base divides the weights of its selected experts by their sum."""

    base_name: str
    model_type: str
    renormalizes: bool
    alpha: float | None = None
    top_k: int | None = None
    gate_weight: GateWeight | None = None
    description: str | None = None


def converted(checkpoint: Checkpoint, base: BaseShape, given: Given) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of docs/format.md. Raises InputError with every problem."""
    _check_family(checkpoint, given)
    kind, said = _kind(checkpoint), checkpoint.config or {}
    layers = tuple(sorted({place.layer for place in checkpoint.tensors}))
    experts = 1 + max(place.expert for place in checkpoint.tensors)
    expert_type, size = _expert_type(checkpoint), _bottleneck(checkpoint)
    contradictions = tensor_problems(said, kind, expert_type, experts, size)
    contradictions += base_problems(said, base, given.renormalizes)
    if contradictions:
        raise InputError(f"{checkpoint.folder}: config.json does not fit", contradictions)
    values: dict[str, Any] = {
        "base_model_name_or_path": given.base_name, "variant": _variant(kind, experts), "expert_type": expert_type,
        "bottleneck": size, "num_experts": experts, "description": given.description,
        "layers": None if layers == base.moe_layers else layers,
    }  # fmt: skip
    values |= _expert_values(checkpoint, kind, expert_type, given) | _routing_values(checkpoint, kind, given)
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise InputError("the checkpoint describes no adapter that can be", _problems(error)) from None
    problems = [*fit_violations(config, base), *_lacking(layers, base)]
    groups = _grouped(checkpoint.tensors, kind, expert_type, config, layers, problems)
    expected = config.tensor_shapes(config.layer_indices(base.moe_layers), base.hidden_size)
    for name, entries in groups.items():
        shape = entries[0].shape if name.endswith("router") else (len(entries), *entries[0].shape)
        if name in expected and shape != expected[name]:
            problems.append(f"{name}: found the shape {list(shape)}, expected {list(expected[name])} on this base")
    if not problems:  # so that nothing is loaded before all headers are judged
        tensors = {name: _together(name, entries) for name, entries in groups.items()}
        problems = [
            f"{name}: found values that are not finite" for name, each in tensors.items() if not _is_finite(each)
        ]
    if problems:
        raise InputError(f"the checkpoint does not fit {given.base_name}", problems)
    return config, tensors


def _check_family(checkpoint: Checkpoint, given: Given) -> None:
    """Raises InputError unless config.json, the names of the tensors and the base are of one family."""
    said = (checkpoint.config or {}).get("model_type")
    named = said.removesuffix("-adapter") if isinstance(said, str) else said
    if named not in (None, given.model_type) or checkpoint.family != given.model_type:
        of_config = "" if said is None else f"model_type {shown(said)} in config.json, and "
        raise InputError(
            f"the checkpoint is not of the base's family: found {of_config}names of tensors as in {checkpoint.family}, "
            f"and {given.base_name} is {given.model_type}: give the base that it was trained on"
        )


def _kind(checkpoint: Checkpoint) -> Kind:
    kinds = sorted({place.kind for place in checkpoint.tensors})
    if len(kinds) > 1:
        raise InputError(
            f"the checkpoint holds {len(kinds)} adapters at once ({', '.join(PREFIX[kind] for kind in kinds)}), and an "
            "adapter of our format is one of them: train them apart"
        )
    return kinds[0]


def _expert_type(checkpoint: Checkpoint) -> ExpertType:
    types = sorted({place.expert_type for place in checkpoint.tensors if place.expert_type is not None})
    if len(types) != 1:
        raise InputError(f"found {' and '.join(types) or 'no'} experts in the checkpoint, expected those of one type")
    return types[0]


def _bottleneck(checkpoint: Checkpoint) -> int:
    shapes = [entry.shape for place, entry in checkpoint.tensors.items() if place.part == "down"]
    if not shapes or not shapes[0]:
        raise InputError("found no matrix lora_A or adapter_w1 in the checkpoint, expected one in every expert")
    return shapes[0][0]


def _variant(kind: Kind, experts: int) -> str:
    if kind == "shared":
        return "S" if experts == 1 else "D"
    return "R" if kind == "routed" else "E"


def _expert_values(checkpoint: Checkpoint, kind: Kind, expert_type: ExpertType, given: Given) -> dict[str, Any]:
    """alpha or activation, from the checkpoint's own arguments."""
    arguments = arguments_of(checkpoint.config or {}, kind)
    if expert_type == "parallel":
        if given.alpha is not None:
            raise InputError(
                "found --alpha, and the checkpoint's experts are parallel ones, which have none: leave it out"
            )
        named = arguments.get("hidden_act", "silu")
        if not isinstance(named, str) or named not in ACTIVATIONS:
            raise InputError(f"found the activation {shown(named)}, expected one of {', '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[named]}
    said = arguments.get("lora_alpha")
    if said is not None and (type(said) not in (int, float) or not 0 < said <= MOST_ALPHA):
        raise InputError(f"config.json says lora_alpha {shown(said)}, expected a number above 0, at most {MOST_ALPHA}")
    alpha = _agreed(checkpoint, "lora_alpha", said, "--alpha", given.alpha, "(scale = alpha / r)")
    return {"alpha": float(alpha)}


def _routing_values(checkpoint: Checkpoint, kind: Kind, given: Given) -> dict[str, Any]:
    """top_k, gate_weight and renormalize of PERFT-R, as the code of the checkpoint's family computes them."""
    if kind != "routed":
        flags = {"--top-k": given.top_k, "--gate-weight": given.gate_weight}
        if found := [flag for flag, value in flags.items() if value is not None]:
            raise InputError(f"found {' and '.join(found)}, and the checkpoint is not of PERFT-R: leave it out")
        return {}
    key = "shared_routing_adapter_num_experts_per_tok"
    said = (checkpoint.config or {}).get(key)
    if said is not None and type(said) is not int:
        raise InputError(f"config.json says {key} {shown(said)}, expected a whole number")
    gate_weight = given.gate_weight or ("base_slot" if checkpoint.family == "olmoe" else "adapter")
    if gate_weight == "base_slot" and given.renormalizes:
        raise InputError(
            f"gate_weight 'base_slot' takes the base's probabilities undivided, and {given.base_name} divides them by "
            "their sum: such a checkpoint cannot be imported"
        )
    return {
        "top_k": _agreed(checkpoint, key, said, "--top-k", given.top_k), "gate_weight": gate_weight,
        "renormalize": gate_weight == "adapter" and (checkpoint.family == "mixtral" or given.renormalizes),
    }  # fmt: skip


def _agreed(checkpoint: Checkpoint, key: str, said: Any, flag: str, given: Any, why: str = "") -> Any:
    """What the checkpoint says, or else the flag; both only if they agree."""
    if said is None and given is None:
        if checkpoint.config is None:
            raise InputError(
                f"found no config.json in {checkpoint.folder}, which says {key}: give it with {flag} {why}".strip()
            )
        raise InputError(f"the checkpoint does not say its {key}: give it with {flag} {why}".strip())
    if said is not None and given is not None and said != given:
        raise InputError(f"found {flag} {given}, and the checkpoint says {said}: leave {flag} out")
    return given if said is None else said


def _lacking(layers: tuple[int, ...], base: BaseShape) -> list[str]:
    """The authors' adapters are in every MoE layer."""
    return [
        f"layer {layer}: found no tensor, expected those of every MoE layer of the base"
        for layer in base.moe_layers
        if layer not in layers
    ]


def _grouped(
    tensors: Mapping[Place, Entry], kind: Kind, expert_type: ExpertType, config: AdapterConfig,
    layers: tuple[int, ...], problems: list[str],
) -> dict[str, list[Entry]]:  # fmt: skip
    """By the name of our tensor, those that it is made of, one an expert; what is missing becomes a problem."""
    groups: dict[str, list[Entry]] = {}
    parts: tuple[tuple[Part, str], ...] = (("down", "down_proj"), ("up", "up_proj"))
    for layer in layers:
        if config.is_routed:
            router = tensors.get(Place(kind, layer, "router"))
            if router is None:
                problems.append(f"layer {layer}: found no router (shared_routing_adapter_gate)")
            else:
                groups[f"layers.{layer}.router"] = [router]
        for part, name in parts:
            found = [tensors.get(Place(kind, layer, part, m, expert_type)) for m in range(config.num_experts)]
            missing = [m for m, entry in enumerate(found) if entry is None]
            problems += [f"layer {layer}: found no {name} of expert {m}" for m in missing]
            present = [entry for entry in found if entry is not None]
            if len({entry.shape for entry in present}) > 1:
                problems.append(f"layer {layer}: the experts' {name} have different shapes")
            elif not missing:
                groups[f"layers.{layer}.{name}"] = present
    return groups


def _together(name: str, entries: list[Entry]) -> torch.Tensor:
    """A router, or the experts' matrices stacked."""
    tensors = loaded(entries)
    return tensors[0].contiguous() if name.endswith("router") else torch.stack(tensors)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _problems(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors()]
