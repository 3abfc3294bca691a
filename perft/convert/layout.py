"""Owns the names of the authors' published checkpoints (docs/method.md, "Published checkpoints"), read and written.

Invariant: a name means one tensor of one layer, or nothing: `parsed` and `written` are each other's inverse.
"""

import re
from dataclasses import dataclass
from typing import Literal

from perft.config import ExpertType

Kind = Literal["shared", "routed", "embedded"]
"""Which of the authors' three adapters: S and D, R, or E."""
Part = Literal["router", "down", "up"]

BLOCKS = {"olmoe": "mlp", "mixtral": "block_sparse_moe"}
"""What the MoE block of a decoder layer is called in each of the authors' models."""

# A number is written in one way: `03`, or digits of another script, would be a second name of the same tensor.
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_NAME = re.compile(
    rf"(?:(?:module|base_model|model)\.)*layers\.{_NUMBER}\.(?P<block>{'|'.join(BLOCKS.values())})\.(?P<rest>.+)\.weight"
)
_RESTS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("shared", re.compile(rf"shared_adapter\.{_NUMBER}\.unit\.(\w+)")),
    ("routed", re.compile(rf"shared_routing_adapter\.{_NUMBER}\.unit\.(\w+)")),
    ("embedded", re.compile(rf"experts\.{_NUMBER}\.embedded_routing_adapter\.unit\.(\w+)")),
    ("embedded", re.compile(rf"experts\.{_NUMBER}\.(lora_[AB])")),
)
_ROUTER = "shared_routing_adapter_gate"
_PARTS: dict[str, tuple[ExpertType, Part]] = {
    "lora_A": ("lora", "down"), "lora_B": ("lora", "up"),
    "adapter_w1": ("parallel", "down"), "adapter_w2": ("parallel", "up"),
}  # fmt: skip
_WRITTEN = {"shared": "shared_adapter.{}", "routed": "shared_routing_adapter.{}",
            "embedded": "experts.{}.embedded_routing_adapter"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs. expert, expert_type: of a router 0 and None."""

    kind: Kind
    layer: int
    part: Part
    expert: int = 0
    expert_type: ExpertType | None = None


def parsed(name: str) -> Place | None:
    """What a tensor of a checkpoint is; None if the authors have no such name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, rest = int(found[1]), found["rest"]
    if rest == _ROUTER:
        return Place("routed", layer, "router")
    for kind, pattern in _RESTS:
        match = pattern.fullmatch(rest)
        if match is not None and match[2] in _PARTS:
            expert_type, part = _PARTS[match[2]]
            return Place(kind, layer, part, int(match[1]), expert_type)
    return None


def family_of(name: str) -> str:
    """Whose names a tensor has that `parsed` knows: a key of BLOCKS."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return next(family for family, block in BLOCKS.items() if block == found["block"])


def written(place: Place, model_type: str) -> str:
    """The authors' name of a tensor, in a model of `model_type` (a key of BLOCKS)."""
    block = f"model.layers.{place.layer}.{BLOCKS[model_type]}"
    if place.part == "router":
        return f"{block}.{_ROUTER}.weight"
    unit = next(name for name, meant in _PARTS.items() if meant == (place.expert_type, place.part))
    return f"{block}.{_WRITTEN[place.kind].format(place.expert)}.unit.{unit}.weight"
