"""Owns the interface between the engine and a back end of the operator: one batch, planned once per step.

The engine calls `Operator.plan` once per step, and in each MoE layer `Step.start` before the base's experts run, then
the `Delta` it returned on their output, before that is reduced over ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    """An adapter that is in the pool: its configuration, its rows by decoder layer, its slot in the pool's tables."""

    config: AdapterConfig
    layers: Mapping[int, LayerRows]
    slot: int


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one step that belong to one adapter, known by `id`: entries start..stop of `Batch.tokens_n`."""

    adapter: PlacedAdapter
    start: int
    stop: int
    id: int = 0


TILE_TOKENS = 16
"""Tokens of one adapter that are worked on together: they share the rows they read."""

Watch = Callable[[int, torch.Tensor], None]
"""Shown every group's expert weights [n, M] (id, weights; 0: not selected) in the steps that are watched."""


@dataclass(frozen=True)
class Batch:
    """The tokens of one step that have an adapter.

    tokens_n: int64 [n] on the host, positions in the step, group after group. groups: no token is in two of them.
    size: tokens of the step, those of the base and padding included. watch: None if the step is not watched.
    """

    tokens_n: torch.Tensor
    groups: Sequence[TokenGroup]
    size: int
    watch: Watch | None = None

    @property
    def layers(self) -> frozenset[int]:
        """The decoder layers that any adapter of the batch touches."""
        return frozenset().union(*(group.adapter.layers for group in self.groups))


Delta = Callable[[torch.Tensor], None]
"""Adds the delta of a layer to the block's output [T, D], in place; the rows of all other tokens stay as they are."""


class Step(Protocol):
    """One planned step."""

    def start(self, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> Delta | None:
        """Begin the delta of one decoder layer; None where no adapter of the step touches it.

        x_TD: the input of the MoE block, in the pool's dtype, as it is until the delta was added. base: what an adapter
        of the step needs is asked for, until then; on a GPU all of it, because a captured graph holds every launch.
        """
        ...


@dataclass(frozen=True)
class Sizes:
    """What a back end with buffers of its own makes them for.

    max_tokens, max_groups: tokens and adapters of one step. captured_tokens: tokens of the largest step that runs as a
    captured graph (0: none does). base_experts: N. base_top_k: J; 0 if the base hides its top-k (then no adapter of
    variant E is served).
    """

    max_tokens: int
    max_groups: int
    captured_tokens: int
    base_experts: int
    base_top_k: int


class Operator(Protocol):
    """One back end.

    max_columns: the largest M * B of an adapter that it was made for, max_routed_experts: the largest M of one of
    variant R. None: any.
    """

    max_columns: int | None
    max_routed_experts: int | None

    def plan(self, batch: Batch) -> Step:
        """Prepare a step. It ends the step before it."""
        ...
