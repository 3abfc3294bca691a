"""The plain torch back end: right on every device, and always there.

An adapter's experts lie together in the pool, so its share of a layer is two products with a gate between their
halves: z = x Down^T [n, M * B], a = act(z) with each expert's B columns times its weight, then a Up. Only the products
are done adapter by adapter; gates and activations once for all adapters that compute alike. Experts that a token did
not select are masked, so a weight of 0 never meets an infinity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from perft.config import AdapterConfig
from perft.operator.base import Batch, Delta, LayerRows, TokenGroup
from perft.routing import BaseRouter, activate, routed_weights, top_probabilities


@dataclass(frozen=True)
class Span:
    """Entries start..stop of `Layout.tokens_n`, and the group they belong to."""

    group: TokenGroup
    start: int
    stop: int

    def rows(self, layer: int) -> LayerRows:
        return self.group.adapter.layers[layer]


@dataclass(frozen=True)
class AlikeGroups:
    """Neighbouring groups whose deltas are computed alike."""

    config: AdapterConfig
    spans: Sequence[Span]

    @property
    def tokens(self) -> slice:
        return slice(self.spans[0].start, self.spans[-1].stop)


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


class TorchOperator:
    """See `perft.operator.base.Operator`. pool_RD: the row pool."""

    max_columns: int | None = None
    max_routed_experts: int | None = None

    def __init__(self, pool_RD: torch.Tensor) -> None:
        self._pool_RD = pool_RD

    def plan(self, batch: Batch) -> "TorchStep":
        return TorchStep(self._pool_RD, batch)


class TorchStep:
    """See `perft.operator.base.Step`. A layout is made once per distinct set of groups that a layer touches."""

    def __init__(self, pool_RD: torch.Tensor, batch: Batch) -> None:
        self._pool_RD, self._batch = pool_RD, batch
        self._groups = sorted(batch.groups, key=lambda group: repr(group.adapter.config.arithmetic))
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def start(self, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> Delta | None:
        layout = self._layout(layer, x_TD.device)
        if layout is None:
            return None
        delta_nD = self._delta(layout, layer, x_TD, base)

        def add(output_TD: torch.Tensor) -> None:
            output_TD.index_add_(0, layout.tokens_n, delta_nD)

        return add

    def _layout(self, layer: int, device: torch.device) -> Layout | None:
        present = tuple(i for i, group in enumerate(self._groups) if layer in group.adapter.layers)
        if present and present not in self._layouts:
            self._layouts[present] = self._lay_out(present, device)
        return self._layouts[present] if present else None

    def _lay_out(self, present: tuple[int, ...], device: torch.device) -> Layout:
        spans: list[Span] = []
        for i in present:
            group, start = self._groups[i], spans[-1].stop if spans else 0
            spans.append(Span(group, start, start + group.stop - group.start))
        runs = groupby(spans, key=lambda span: span.group.adapter.config.arithmetic)
        alike = [list(run) for _, run in runs]
        tokens_n = torch.cat([self._batch.tokens_n[span.group.start : span.group.stop] for span in spans])
        return Layout(tokens_n.to(device), [AlikeGroups(run[0].group.adapter.config, run) for run in alike])

    def _delta(self, layout: Layout, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        """The delta of every token of the layout, [n, D] in x's dtype, in its order."""
        x_nD = x_TD.index_select(0, layout.tokens_n)
        base_nN = base.weights().index_select(0, layout.tokens_n) if layout.needs_base_weights else None
        slots_nK = None
        if layout.slots:
            slots_nK = top_probabilities(base.logits().index_select(0, layout.tokens_n), layout.slots)
        delta_nD = torch.empty_like(x_nD)
        for groups in layout.alike:
            part = groups.tokens
            if groups.config.variant == "E":
                weights_nM = None if base_nN is None else base_nN[part]
            else:
                slots = None if slots_nK is None else slots_nK[part, : groups.config.top_k]
                weights_nM = self._own_weights(groups, layer, x_nD, slots)
            if self._batch.watch is not None and weights_nM is not None:
                for span in groups.spans:
                    self._batch.watch(span.group.id, _of(weights_nM, span, part))
            z_nZ = x_nD.new_empty(part.stop - part.start, groups.config.num_experts * groups.config.bottleneck)
            for span in groups.spans:
                down_ZD = self._pool_RD[span.rows(layer).down]
                torch.mm(x_nD[span.start : span.stop], down_ZD.T, out=_of(z_nZ, span, part))
            a_nZ = _gate(groups, z_nZ, weights_nM)
            for span in groups.spans:
                up_ZD = self._pool_RD[span.rows(layer).up]
                torch.mm(_of(a_nZ, span, part), up_ZD, out=delta_nD[span.start : span.stop])
        return delta_nD

    def _own_weights(
        self, groups: AlikeGroups, layer: int, x_nD: torch.Tensor, slots_nK: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Weight of every PEFT expert [n, M] float32 by the adapters' own routers; None where all count 1 (D, S)."""
        if not groups.config.is_routed:
            return None
        part = groups.tokens
        logits_nM = torch.empty(part.stop - part.start, groups.config.num_experts, device=x_nD.device)
        for span in groups.spans:
            router = span.rows(layer).router
            assert router is not None
            x_float = x_nD[span.start : span.stop].float()
            torch.mm(x_float, self._pool_RD[router].float().T, out=_of(logits_nM, span, part))
        return routed_weights(groups.config, logits_nM, slots_nK)


def _of(tensor: torch.Tensor, span: Span, part: slice) -> torch.Tensor:
    """The span's entries of a tensor that holds `part` of the layout."""
    return tensor[span.start - part.start : span.stop - part.start]


def _gate(groups: AlikeGroups, z_nZ: torch.Tensor, weights_nM: torch.Tensor | None) -> torch.Tensor:
    """weight_m * act(z_m), [n, M * B] in z's dtype; computed in float32. `scale` is in the up rows already."""
    config = groups.config
    a_nZ = activate(config.activation, z_nZ.float())
    if weights_nM is None:
        return a_nZ.to(z_nZ.dtype)
    a_nMB = a_nZ.view(-1, config.num_experts, config.bottleneck)
    gate_nM1 = weights_nM.unsqueeze(2)
    return torch.where(gate_nM1 != 0, a_nMB * gate_nM1, 0.0).flatten(1).to(z_nZ.dtype)
