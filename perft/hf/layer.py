"""Owns one adapter at one MoE layer in its trainable form. Only the experts that a token uses are computed.

Invariant: the forward pass and its gradients are the same from run to run (no sum whose order depends on threads), so
that a training that was killed and resumed gives the same adapter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from perft.config import AdapterConfig
from perft.reference import LayerWeights
from perft.routing import BaseRouter, activate, chosen_experts, top_probabilities

_ALIGNMENT = 16
"""Bytes that a row of each operand of a grouped product must be a multiple of."""


class PerftLayer(nn.Module):
    """router [M, D] (R only), down_proj [M, B, D], up_proj [M, D, B].

    down ~ N(0, sqrt(2 / B)) and router ~ N(0, 0.02), as in the paper's code. up ~ N(0, 1) * `up_std`: the paper's code
    has 1e-6; with 0 a fresh adapter equals the base bit for bit. dropout: of the input (lora) or the hidden width
    (parallel), in training only.
    """

    def __init__(self, config: AdapterConfig, hidden_size: int, dropout: float = 0.0, up_std: float = 0.0) -> None:
        super().__init__()
        m, b, d = config.num_experts, config.bottleneck, hidden_size
        self.config, self.dropout = config, dropout
        self.router = nn.Parameter(torch.randn(m, d) * 0.02) if config.is_routed else None
        self.down_proj = nn.Parameter(torch.randn(m, b, d) * (2 / b) ** 0.5)
        self.up_proj = nn.Parameter(torch.randn(m, d, b) * up_std if up_std else torch.zeros(m, d, b))
        self.router_logits_TM: torch.Tensor | None = None

    def forward(self, x_TD: torch.Tensor, base: BaseRouter) -> torch.Tensor:
        """The adapter's delta [T, D] in the parameters' dtype. `router_logits_TM` is kept, for the auxiliary loss."""
        x_TD = x_TD.to(self.down_proj.dtype)
        choice = self._choice(x_TD, base)
        if choice is None:
            return self._all_experts(x_TD)
        return self._selected_experts(x_TD, *choice)

    def weights(self) -> LayerWeights:
        """The parameters in the form that the reference takes."""
        return LayerWeights(self.router, self.down_proj, self.up_proj)

    def _choice(self, x_TD: torch.Tensor, base: BaseRouter) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and numbers [T, K] of the experts that each token uses; None if all of them with weight 1."""
        config = self.config
        if config.variant == "E":
            return base.top()
        if self.router is None:
            if not self._drops or config.num_experts == 1:
                return None
            everyone_TM = torch.arange(config.num_experts, device=x_TD.device).expand(len(x_TD), -1)
            return torch.ones_like(everyone_TM, dtype=torch.float32), everyone_TM  # each expert drops for itself
        slots_TK = None
        if config.gate_weight == "base_slot" and config.top_k is not None:
            slots_TK = top_probabilities(base.logits(), config.top_k)
        self.router_logits_TM = F.linear(x_TD.float(), self.router.float())
        return chosen_experts(config, self.router_logits_TM, slots_TK)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _all_experts(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Every expert with weight 1: two products for all of them."""
        x_TD = self._dropped_input(x_TD)
        z_TW = F.linear(x_TD, self.down_proj.flatten(0, 1))
        return F.linear(self._activated(z_TW) * self.config.scale, self.up_proj.transpose(0, 1).flatten(1))

    def _selected_experts(self, x_TD: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """The uses (token, k), expert after expert, through Down and Up, and back to their tokens."""
        top_k = chosen_TK.shape[1]
        expert_U = chosen_TK.flatten()
        order_U = expert_U.argsort(stable=True)
        place_U = torch.empty_like(order_U).scatter_(0, order_U, torch.arange(len(order_U), device=order_U.device))
        uses_M = expert_U.bincount(minlength=self.config.num_experts)
        x_UD = _reordered(x_TD.repeat_interleave(top_k, dim=0), order_U, place_U)
        z_UB = _products(self._dropped_input(x_UD), self.down_proj, uses_M)
        gate_U1 = weights_TK.flatten()[order_U].unsqueeze(1) * self.config.scale
        a_UB = self._activated(z_UB) * gate_U1.to(z_UB.dtype)
        y_UD = _reordered(_products(a_UB, self.up_proj, uses_M), place_U, order_U)
        return y_UD.view(-1, top_k, y_UD.shape[1]).sum(dim=1)

    def _dropped_input(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout) if self._drops and self.config.expert_type == "lora" else x

    def _activated(self, z: torch.Tensor) -> torch.Tensor:
        if self._drops and self.config.expert_type == "parallel":
            z = F.dropout(z, self.dropout)
        return activate(self.config.activation, z)


class _Reordered(torch.autograd.Function):
    """x[order], where `place` undoes `order`: the gradient is gathered too, never added up."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(place)
        return x.index_select(0, order)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place,) = context.saved_tensors
        return gradient.index_select(0, place), None, None


def _reordered(x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Reordered.apply(x, order, place)  # type: ignore[no-untyped-call]
    return found


def _products(x_UI: torch.Tensor, weight_MOI: torch.Tensor, uses_M: torch.Tensor) -> torch.Tensor:
    """Each part of x, `uses_M` rows after another, times its expert's matrix: [U, O]."""
    rows = (x_UI.shape[1] * x_UI.element_size(), weight_MOI.shape[1] * weight_MOI.element_size())
    if not any(row % _ALIGNMENT for row in rows):
        ends_M = uses_M.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_UI.contiguous(), weight_MOI.transpose(1, 2), offs=ends_M)
    parts = torch.split(x_UI, uses_M.tolist())
    return torch.cat([part @ weight_OI.T for part, weight_OI in zip(parts, weight_MOI, strict=True)])
