"""The plain torch back end: right on every device, and always there.

An adapter's experts lie together in the pool, so its share of a layer is two products with a gate between their
halves: z = x Down^T [n, M * B], a = act(z) with each expert's B columns times its weight, then a Up. Only the products
are done adapter by adapter; gates and activations once for all adapters that compute alike. Experts that a token did
not select are masked, so a weight of 0 never meets an infinity.
"""

import torch

from perft.operator.base import AlikeGroups, LayerPlan
from perft.routing import BaseRouter, activate, routed_weights, top_probabilities


class TorchOperator:
    """See `perft.operator.base.Operator`."""

    def delta(self, pool_RD: torch.Tensor, plan: LayerPlan, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        layout = plan.layout
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
                weights_nM = _own_weights(groups, plan, pool_RD, x_nD, slots)
            if plan.watch is not None and weights_nM is not None:
                for span in groups.spans:
                    plan.watch(plan.ids[span.group], _of(weights_nM, span.start, span.end, part))
            z_nZ = x_nD.new_empty(part.stop - part.start, groups.config.num_experts * groups.config.bottleneck)
            for span in groups.spans:
                down_ZD = pool_RD[plan.rows[span.group].down]
                torch.mm(x_nD[span.start : span.end], down_ZD.T, out=_of(z_nZ, span.start, span.end, part))
            a_nZ = _gate(groups, z_nZ, weights_nM)
            for span in groups.spans:
                up_ZD = pool_RD[plan.rows[span.group].up]
                torch.mm(_of(a_nZ, span.start, span.end, part), up_ZD, out=delta_nD[span.start : span.end])
        return delta_nD


def _of(tensor: torch.Tensor, start: int, end: int, part: slice) -> torch.Tensor:
    """Entries start..end of the layout in a tensor that holds `part` of it."""
    return tensor[start - part.start : end - part.start]


def _own_weights(
    groups: AlikeGroups, plan: LayerPlan, pool_RD: torch.Tensor, x_nD: torch.Tensor, slots_nK: torch.Tensor | None
) -> torch.Tensor | None:
    """Weight of every PEFT expert [n, M] float32 by the adapters' own routers; None where all count 1 (D, S)."""
    if not groups.config.is_routed:
        return None
    part = groups.tokens
    logits_nM = torch.empty(part.stop - part.start, groups.config.num_experts, device=x_nD.device)
    for span in groups.spans:
        router = plan.rows[span.group].router
        assert router is not None
        x_float = x_nD[span.start : span.end].float()
        torch.mm(x_float, pool_RD[router].float().T, out=_of(logits_nM, span.start, span.end, part))
    return routed_weights(groups.config, logits_nM, slots_nK)


def _gate(groups: AlikeGroups, z_nZ: torch.Tensor, weights_nM: torch.Tensor | None) -> torch.Tensor:
    """weight_m * act(z_m), [n, M * B] in z's dtype; computed in float32. `scale` is in the up rows already."""
    config = groups.config
    a_nZ = activate(config.activation, z_nZ.float())
    if weights_nM is None:
        return a_nZ.to(z_nZ.dtype)
    a_nMB = a_nZ.view(-1, config.num_experts, config.bottleneck)
    gate_nM1 = weights_nM.unsqueeze(2)
    return torch.where(gate_nM1 != 0, a_nMB * gate_nM1, 0.0).flatten(1).to(z_nZ.dtype)
