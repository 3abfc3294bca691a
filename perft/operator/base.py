"""Owns the operands of the operator: where adapters lie in the pool, which tokens are whose.

Invariant: a plan is made once per engine step and read by every layer; a layer changes nothing in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from perft.config import AdapterConfig
from perft.routing import BaseRouter

Rows = slice | torch.Tensor
"""Rows of the pool: a slice where they lie together (indexing gives a view), else an int64 index."""


@dataclass(frozen=True)
class LayerRows:
    """Where one adapter lies at one layer: router [M], down [M * B] and up [M * B] rows of width D."""

    router: Rows | None
    down: Rows
    up: Rows


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter that is in the pool: its configuration and its rows, by decoder layer."""

    config: AdapterConfig
    layers: Mapping[int, LayerRows]


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one step (int64 [n], positions in the batch) that belong to one adapter."""

    adapter: PlacedAdapter
    tokens_n: torch.Tensor


@dataclass(frozen=True)
class LayerGroup:
    """One adapter's part of a layer plan: entries start..end of `LayerPlan.tokens_n`."""

    config: AdapterConfig
    rows: LayerRows
    start: int
    end: int


@dataclass(frozen=True)
class LayerPlan:
    """What one layer has to add: for token `tokens_n[i]` (no token twice), the delta of its group."""

    tokens_n: torch.Tensor
    groups: Sequence[LayerGroup]

    @property
    def needs_base_weights(self) -> bool:
        return any(group.config.variant == "E" for group in self.groups)

    @property
    def slots(self) -> int:
        """How many of the base's largest probabilities `base_slot` adapters use (0: there are none)."""
        return max((g.config.top_k or 0 for g in self.groups if g.config.gate_weight == "base_slot"), default=0)


@dataclass
class BatchPlan:
    """The groups of one engine step; `at(layer)` is made on first use, once per distinct set of adapters."""

    groups: Sequence[TokenGroup]
    _tokens: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def at(self, layer: int) -> LayerPlan | None:
        """The plan of one decoder layer, None where no adapter of the step touches it."""
        present = tuple(i for i, group in enumerate(self.groups) if layer in group.adapter.layers)
        if not present:
            return None
        if present not in self._tokens:
            self._tokens[present] = torch.cat([self.groups[i].tokens_n for i in present])
        layer_groups, start = [], 0
        for i in present:
            group = self.groups[i]
            end = start + group.tokens_n.numel()
            layer_groups.append(LayerGroup(group.adapter.config, group.adapter.layers[layer], start, end))
            start = end
        return LayerPlan(self._tokens[present], layer_groups)


class Operator(Protocol):
    """One back end."""

    def delta(self, pool_RD: torch.Tensor, plan: LayerPlan, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        """The delta of every planned token, [n, D] in x's dtype, in the order of `plan.tokens_n`.

        pool_RD: the row pool, in x's dtype. x_TD: the input of the MoE block; may have more rows than the plan
        speaks of. base: asked only if a group needs it.
        """
        ...
