"""Owns THE MoE LAYER: vLLM's MoE runner, plus the PERFT delta of the adapters in the step.

Invariant: without a plan for this layer `forward` IS the base's forward; with one, the rows of tokens without an
adapter are exactly the base's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from perft.engine.base_router import VllmBaseRouter
from perft.operator import Operator
from perft.operator.base import BatchPlan


@dataclass
class StepState:
    """State that all MoE layers of a worker share. pool_RD: the row pool. plan: the step's (None: the base only)."""

    pool_RD: torch.Tensor
    operator: Operator
    plan: BatchPlan | None = None


class PerftMoERunner(MoERunner):
    """MoERunner that adds the PERFT delta. `perft` is None until a manager attaches its state."""

    perft: StepState | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block's output [T, D], reduced over ranks, plus the delta of each planned token.

        hidden_states: [T, D]. router_logits: [T, N], or the hidden states if the runner owns the gate.

        The delta is computed first, because the expert kernels may overwrite `hidden_states`, and added last, after
        the reduction, so that every rank adds all of it once.
        """
        state = self.perft
        plan = None if state is None or state.plan is None else state.plan.at(self.layer_id)
        if state is None or plan is None:
            base_TD: torch.Tensor = super().forward(hidden_states, router_logits, input_ids, shared_experts_input)
            return base_TD
        x_TD = hidden_states if shared_experts_input is None else shared_experts_input
        base = VllmBaseRouter(self, hidden_states, router_logits, input_ids)
        delta_nD = state.operator.delta(state.pool_RD, plan, x_TD, base)
        output_TD: torch.Tensor = super().forward(hidden_states, router_logits, input_ids, shared_experts_input)
        return output_TD.index_add_(0, plan.tokens_n, delta_nD)


class PerftRoutedExperts(RoutedExperts):
    """RoutedExperts that picks its kernels as if LoRA were off: PERFT never changes the inside of a base expert."""

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any) -> None:
        moe_config.is_lora_enabled = False
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)


def install_moe_runner() -> None:
    """Register both classes in vLLM's table of replaced layers, once per process."""
    from vllm.model_executor.custom_op import op_registry_oot

    for name, layer_class in (("MoERunner", PerftMoERunner), ("RoutedExperts", PerftRoutedExperts)):
        if op_registry_oot.get(name) is not layer_class:
            layer_class.register_oot(layer_class, name=name)
