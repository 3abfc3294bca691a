"""Owns what a checkpoint's config.json says about its adapter, held against its tensors and the base.

Invariant: a key that changes what the adapter computes is taken over or refused, and never passed by.
"""

from collections.abc import Mapping
from typing import Any

from perft.base_model import BaseShape
from perft.config import ExpertType
from perft.convert.layout import Kind
from perft.errors import InputError
from perft.reading import printable

PREFIX: dict[Kind, str] = {
    "shared": "shared_adapter", "routed": "shared_routing_adapter", "embedded": "embedded_routing_adapter",
}  # fmt: skip
TYPES: dict[str, ExpertType] = {"LoRA": "lora", "Parallel_Adapter": "parallel"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}
MOST_ALPHA = 65536

_SIZE: dict[ExpertType, str] = {"lora": "r", "parallel": "hidden_dim"}
_COUNT: dict[Kind, str] = {"shared": "shared_adapter_num", "routed": "shared_routing_adapter_num_experts"}
_ARGUMENTS: dict[ExpertType, tuple[str, ...]] = {
    "lora": ("r", "lora_alpha", "lora_dropout", "dropout"),
    "parallel": ("hidden_dim", "hidden_act", "dropout"),
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,),
    "fan_in_fan_out": (False,), "bias": ("none", False), "rank_pattern": ({},), "alpha_pattern": ({},),
    "modules_to_save": ([],), "layer_replication": ([],),
}  # fmt: skip
"""Keys of PEFT's LoRA that change what is computed, and the values with which they do not."""


def shown(value: object) -> str:
    """A value as it was found, on one line of at most 80 characters."""
    text = printable(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def arguments_of(config: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    """The arguments of one expert: those of its kind, or else the keys of the file itself. Raises InputError."""
    found = config.get(f"{PREFIX[kind]}_args")
    if found is None:
        return config
    if not isinstance(found, dict):
        raise InputError(f"config.json says {PREFIX[kind]}_args {shown(found)}, expected an object")
    return found


def tensor_problems(
    config: Mapping[str, Any], kind: Kind, expert_type: ExpertType, experts: int, size: int
) -> list[str]:
    """How config.json contradicts the tensors, which are of `experts` experts of bottleneck `size`; and what it says
    that our format has no place for."""
    arguments, prefix = arguments_of(config, kind), PREFIX[kind]
    found = _flag_problems(config, kind)
    named = config.get(f"{prefix}_type")
    if named is not None and not (isinstance(named, str) and TYPES.get(named) == expert_type):
        found.append(f"config.json says {prefix}_type {shown(named)}, and the tensors are of {expert_type} experts")
    said = config.get(_COUNT[kind]) if kind in _COUNT else None
    if said is not None and not is_same(said, experts):
        found.append(f"config.json says {shown(said)} experts, and the tensors are of {experts} ({_COUNT[kind]})")
    said = arguments.get(_SIZE[expert_type])
    if said is not None and not is_same(said, size):
        found.append(f"config.json says {_SIZE[expert_type]} {shown(said)}, and the tensors have {size}")
    for source in (config, arguments) if arguments is not config else (config,):
        found += [
            f"config.json says {key} {shown(source[key])}, which our format has no place for"
            for key, neutral in _NEUTRAL.items()
            if source.get(key) is not None and not any(is_same(source[key], value) for value in neutral)
        ]
    if arguments is not config:
        known = _ARGUMENTS[expert_type]
        found += [
            f"config.json has the key {shown(key)} in {prefix}_args, expected {', '.join(known)} alone"
            for key in arguments
            if key not in known and key not in _NEUTRAL
        ]
    return found


def base_problems(config: Mapping[str, Any], base: BaseShape, renormalizes: bool) -> list[str]:
    """How config.json contradicts the base."""
    expected = {
        "hidden_size": base.hidden_size, "num_hidden_layers": base.num_layers, "num_experts": base.num_experts,
        "num_local_experts": base.num_experts, "num_experts_per_tok": base.top_k, "norm_topk_prob": renormalizes,
    }  # fmt: skip
    return [
        f"config.json says {key} {shown(config[key])}, and the base has {value}"
        for key, value in expected.items()
        if config.get(key) is not None and not is_same(config[key], value)
    ]


def is_same(found: Any, expected: Any) -> bool:
    """Whether a value is what was expected, and of its type: 1 is not true, and "6" is not 6."""
    return type(found) is type(expected) and bool(found == expected)


def _flag_problems(config: Mapping[str, Any], own: Kind) -> list[str]:
    """The three keys that say which kinds of adapter there are."""
    found = []
    for kind, key in PREFIX.items():
        said = config.get(key)
        if said is not None and type(said) is not bool:
            found.append(f"config.json says {key} {shown(said)}, expected true or false")
        elif said is not None and said != (kind == own):
            found.append(f"config.json says {key} {str(said).lower()}, and the tensors are of {PREFIX[own]} alone")
    return found
