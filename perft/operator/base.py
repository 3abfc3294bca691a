"""Owns the operands of the operator: where adapters lie in the pool, which tokens are whose.

Invariant: a plan is made once per engine step and read by every layer; a layer changes nothing in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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
    """The tokens of one step (int64 [n], positions in the batch) that belong to one adapter, known by `id`."""

    adapter: PlacedAdapter
    tokens_n: torch.Tensor
    id: int = 0


Watch = Callable[[int, torch.Tensor], None]
"""Shown every group's expert weights [n, M] (id, weights; 0: not selected) in the steps that are watched."""


@dataclass(frozen=True)
class Span:
    """Entries start..end of `Layout.tokens_n`, and the index of the group they belong to."""

    group: int
    start: int
    end: int


@dataclass(frozen=True)
class AlikeGroups:
    """Neighbouring groups whose deltas are computed alike: one back end call does what they share for all of them."""

    config: AdapterConfig
    spans: Sequence[Span]

    @property
    def tokens(self) -> slice:
        return slice(self.spans[0].start, self.spans[-1].end)


@dataclass(frozen=True)
class Layout:
    """In which order a layer's tokens are worked on: token `tokens_n[i]` belongs to the span that holds i."""

    tokens_n: torch.Tensor
    alike: Sequence[AlikeGroups]

    @property
    def needs_base_weights(self) -> bool:
        return any(groups.config.variant == "E" for groups in self.alike)

    @property
    def slots(self) -> int:
        """How many of the base's largest probabilities `base_slot` adapters use (0: there are none)."""
        return max((g.config.top_k or 0 for g in self.alike if g.config.gate_weight == "base_slot"), default=0)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer has to add: its layout, and where each group's rows lie at this layer.

    `ids` are the groups' adapters, for `watch` (None: this step is not watched).
    """

    layout: Layout
    rows: Mapping[int, LayerRows]
    ids: Sequence[int] = ()
    watch: Watch | None = None

    @property
    def tokens_n(self) -> torch.Tensor:
        return self.layout.tokens_n


class BatchPlan:
    """The groups of one engine step (no token in two of them). A layout is made once per distinct set of groups."""

    def __init__(self, groups: Sequence[TokenGroup], watch: Watch | None = None) -> None:
        self._groups = sorted(groups, key=lambda group: repr(group.adapter.config.arithmetic))
        self._ids = [group.id for group in self._groups]
        self._watch = watch
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def at(self, layer: int) -> LayerPlan | None:
        """The plan of one decoder layer, None where no adapter of the step touches it."""
        rows = {i: group.adapter.layers[layer] for i, group in enumerate(self._groups) if layer in group.adapter.layers}
        if not rows:
            return None
        present = tuple(rows)
        if present not in self._layouts:
            self._layouts[present] = self._lay_out(present)
        return LayerPlan(self._layouts[present], rows, self._ids, self._watch)

    def _lay_out(self, present: tuple[int, ...]) -> Layout:
        spans: list[Span] = []
        for i in present:
            start = spans[-1].end if spans else 0
            spans.append(Span(i, start, start + self._groups[i].tokens_n.numel()))
        runs = groupby(spans, key=lambda span: self._groups[span.group].adapter.config.arithmetic)
        alike = [list(run) for _, run in runs]
        tokens_n = torch.cat([self._groups[i].tokens_n for i in present])
        return Layout(tokens_n, [AlikeGroups(self._groups[run[0].group].adapter.config, run) for run in alike])


class Operator(Protocol):
    """One back end."""

    def delta(self, pool_RD: torch.Tensor, plan: LayerPlan, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        """The delta of every planned token, [n, D] in x's dtype, in the order of `plan.tokens_n`.

        pool_RD: the row pool, in x's dtype. x_TD: the input of the MoE block; may have more rows than the plan
        speaks of. base: asked only if a group needs it.
        """
        ...
