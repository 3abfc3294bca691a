"""THE MoE LAYER: vLLM's MoE runner, plus the PERFT delta of the adapters in the step.

Invariant: without a plan for this layer `forward` IS the base's forward; with one, rows of tokens that belong to
no adapter are left exactly as the base gave them.
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
    """What every MoE layer of a worker shares: the pool, the back end, and the plan of the running step."""

    pool_RD: torch.Tensor
    operator: Operator
    plan: BatchPlan | None = None


class PerftMoERunner(MoERunner):
    """MoERunner with the term of PERFT. `perft` is None until a manager takes the layer in its care."""

    perft: StepState | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block's output [T, D], reduced over ranks, plus each planned token's delta.

        The delta is computed first, because the expert kernels may overwrite `hidden_states`; it is added last,
        after the reduction, so that every rank adds the whole of it once.
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
    """RoutedExperts that picks its kernels as if LoRA were off: PERFT never touches the inside of a base expert."""

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any) -> None:
        moe_config.is_lora_enabled = False
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)


def install_moe_runner() -> None:
    """Register both classes in vLLM's table of replaced layers (once per process)."""
    from vllm.model_executor.custom_op import op_registry_oot

    for name, layer_class in (("MoERunner", PerftMoERunner), ("RoutedExperts", PerftRoutedExperts)):
        if op_registry_oot.get(name) is not layer_class:
            layer_class.register_oot(layer_class, name=name)
