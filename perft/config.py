"""Owns what an adapter's configuration is (docs/format.md, `adapter_config.json`) and its rules across keys.

Invariant: every `AdapterConfig` satisfies the rules of the format that need neither the weights nor the base model;
`adapters.format.folder` checks the others.
"""

import json
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Variant = Literal["R", "E", "D", "S"]
ExpertType = Literal["lora", "parallel"]
Activation = Literal["silu", "relu", "gelu"]
GateWeight = Literal["adapter", "base_slot"]

LayerIndex = Annotated[int, Field(strict=True, ge=0, le=65535)]

ROUTED_ONLY = ("top_k", "renormalize", "gate_weight")
NULLABLE = ("base_fingerprint", "layers")
FOR_PEOPLE = ("description", "base_model_name_or_path", "base_fingerprint")


class AdapterConfig(BaseModel):
    """One adapter's configuration; the keys are docs/format.md's.

    `M` PEFT experts of bottleneck `B` on each of `layers` (None: every MoE layer). Keys that do not
    apply to the variant or expert type are None.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    peft_type: Literal["PERFT"] = "PERFT"
    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    base_model_name_or_path: str
    base_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    variant: Variant
    expert_type: ExpertType
    bottleneck: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = None
    activation: Activation | None = None
    num_experts: Annotated[int, Field(ge=1, le=1024)]
    top_k: Annotated[int, Field(ge=1)] | None = None
    renormalize: bool | None = None
    gate_weight: GateWeight | None = None
    layers: Annotated[tuple[LayerIndex, ...], Field(strict=False, min_length=1)] | None = None
    description: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """Fill in the defaults that depend on another key."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if filled.get("expert_type") == "parallel":
            filled.setdefault("activation", "silu")
        if filled.get("variant") == "R":
            filled.setdefault("gate_weight", "adapter")
        return filled

    @model_validator(mode="after")
    def _check_rules(self) -> "AdapterConfig":
        violations = rule_violations({key: value for key, value in self if value is not None})
        if violations:
            raise ValueError("; ".join(violations))
        return self

    @property
    def scale(self) -> float:
        """alpha / bottleneck for lora (not rank-stabilised), 1 for parallel."""
        return 1.0 if self.alpha is None else self.alpha / self.bottleneck

    @property
    def arithmetic(self) -> tuple[object, ...]:
        """What determines how a delta is computed: adapters equal in it differ only in their weights."""
        shape = (self.num_experts, self.bottleneck, self.top_k)
        return (self.variant, self.activation, self.renormalize, self.gate_weight, *shape)

    @property
    def is_routed(self) -> bool:
        """Whether the adapter has a router of its own (PERFT-R)."""
        return self.variant == "R"

    @property
    def needs_base_weights(self) -> bool:
        """Whether the output depends on the base router (PERFT-E, or R with `base_slot`)."""
        return self.variant == "E" or self.gate_weight == "base_slot"

    def layer_indices(self, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
        """The decoder layers that carry the adapter, given those of the base that are MoE layers."""
        return moe_layers if self.layers is None else self.layers

    def rows_per_layer(self) -> int:
        """Rows of width D that one layer takes: M B down, M B up, and M for a router."""
        return 2 * self.num_experts * self.bottleneck + self.router_rows

    @property
    def router_rows(self) -> int:
        """Rows of width D that the adapter's own router takes in one layer: M, or none."""
        return self.num_experts if self.is_routed else 0

    def tensor_shapes(self, layers: tuple[int, ...], hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of `adapter_model.safetensors` (docs/format.md)."""
        m, b, d = self.num_experts, self.bottleneck, hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in layers:
            if self.is_routed:
                shapes[f"layers.{layer}.router"] = (m, d)
            shapes[f"layers.{layer}.down_proj"] = (m, b, d)
            shapes[f"layers.{layer}.up_proj"] = (m, d, b)
        return shapes

    def canonical_json(self) -> bytes:
        """The bytes `C` of docs/format.md's identity: every default filled in, without the keys that are for people."""
        kept = {
            key: list(value) if key == "layers" and value is not None else value
            for key, value in self
            if key not in FOR_PEOPLE and (value is not None or key == "layers")
        }
        return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()

    def file_json(self) -> str:
        """The text of `adapter_config.json`."""
        return json.dumps(self.model_dump(exclude_none=True), indent=2, ensure_ascii=False) + "\n"


def rule_violations(given: Mapping[str, Any], invalid: Collection[str] = ()) -> list[str]:
    """Every broken rule across the keys of a configuration.

    given: the values of the keys that are present and valid on their own. invalid: the keys that are present and
    invalid, about which nothing more is reported.
    """
    found: list[str] = []
    variant, expert_type, count = given.get("variant"), given.get("expert_type"), given.get("num_experts")
    if expert_type == "lora" and "alpha" not in given and "alpha" not in invalid:
        found.append("alpha: missing, but expert_type 'lora' needs it (scale = alpha / bottleneck)")
    if expert_type == "parallel" and "alpha" in given:
        found.append(f"alpha: found {given['alpha']!r}, but expert_type 'parallel' has no scale: remove it")
    if expert_type == "lora" and "activation" in given:
        found.append(f"activation: found {given['activation']!r}, but it is for expert_type 'parallel': remove it")
    if variant == "R":
        missing = [key for key in ("top_k", "renormalize") if key not in given and key not in invalid]
        found += [f"{key}: missing, but variant 'R' needs it" for key in missing]
    elif variant is not None:
        found += [
            f"{key}: found {given[key]!r}, but it is for variant 'R' and this is {variant!r}: remove it"
            for key in ROUTED_ONLY
            if key in given
        ]
    if variant == "S" and count is not None and count != 1:
        found.append(f"num_experts: found {count}, but variant 'S' has exactly 1 (several: variant 'D')")
    top_k = given.get("top_k")
    if top_k is not None and count is not None and top_k > count:
        found.append(f"top_k: found {top_k}, expected at most num_experts = {count}")
    if given.get("gate_weight") == "base_slot" and given.get("renormalize") is True:
        found.append("renormalize: found true, but gate_weight 'base_slot' needs false")
    layers = given.get("layers")
    if layers is not None and any(a >= b for a, b in pairwise(layers)):
        found.append(f"layers: found {list(layers)}, expected ascending indices without repeats")
    return found
