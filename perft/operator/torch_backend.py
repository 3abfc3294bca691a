"""The plain torch back end: right on every device, and always there.

An adapter's experts lie together in the pool, so its whole share of a layer is two products with a gate
between their halves: a = act(x Down^T) [n, M * B], each expert's B columns times its weight, then a Up. Experts
that a token did not select are masked, so a weight of 0 never meets an infinity.
"""

import torch

from perft.operator.base import LayerGroup, LayerPlan
from perft.routing import BaseRouter, activate, routed_weights, top_probabilities


class TorchOperator:
    """See `perft.operator.base.Operator`."""

    def delta(self, pool_RD: torch.Tensor, plan: LayerPlan, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        x_nD = x_TD.index_select(0, plan.tokens_n)
        base_nN = base.weights().index_select(0, plan.tokens_n) if plan.needs_base_weights else None
        slots_nK = None
        if plan.slots:
            slots_nK = top_probabilities(base.logits().index_select(0, plan.tokens_n), plan.slots)
        delta_nD = torch.empty_like(x_nD)
        for group in plan.groups:
            part = slice(group.start, group.end)
            weights_nM = _expert_weights(
                group,
                pool_RD,
                x_nD[part],
                None if base_nN is None else base_nN[part],
                None if slots_nK is None else slots_nK[part],
            )
            _add_up(group, pool_RD, x_nD[part], weights_nM, out_nD=delta_nD[part])
        return delta_nD


def _expert_weights(
    group: LayerGroup,
    pool_RD: torch.Tensor,
    x_nD: torch.Tensor,
    base_nN: torch.Tensor | None,
    slots_nK: torch.Tensor | None,
) -> torch.Tensor | None:
    """Weight of every PEFT expert [n, M] float32, 0 where not selected; None where all count 1 (D, S)."""
    config = group.config
    if config.variant == "E":
        return base_nN
    if not config.is_routed:
        return None
    assert group.rows.router is not None
    logits_nM = x_nD.float() @ pool_RD[group.rows.router].float().T
    return routed_weights(config, logits_nM, None if slots_nK is None else slots_nK[:, : config.top_k])


def _add_up(
    group: LayerGroup,
    pool_RD: torch.Tensor,
    x_nD: torch.Tensor,
    weights_nM: torch.Tensor | None,
    out_nD: torch.Tensor,
) -> None:
    """out = sum over m of weight_m * scale * Up_m act(Down_m x)."""
    config = group.config
    z_nZ = x_nD @ pool_RD[group.rows.down].T  # Z = M * B
    a_nZ = activate(config.activation, z_nZ.float())
    if weights_nM is not None:
        a_nMB = a_nZ.view(-1, config.num_experts, config.bottleneck)
        gate_nM1 = (weights_nM * config.scale).unsqueeze(2)
        a_nZ = torch.where(gate_nM1 != 0, a_nMB * gate_nM1, 0.0).flatten(1)
    elif config.scale != 1:
        a_nZ = a_nZ * config.scale
    torch.mm(a_nZ.to(x_nD.dtype), pool_RD[group.rows.up], out=out_nD)
