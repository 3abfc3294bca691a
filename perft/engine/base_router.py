"""Owns what PERFT reads from vLLM's router at one layer: the logits, and the weight that each base expert gets.

Invariant: reading changes nothing in the router. Where the base's weights cannot be known, `embedded_problem` says so
and PERFT-E is refused.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class VllmBaseRouter:
    """The base router of one MoE layer for the tokens of one step (see `perft.routing.BaseRouter`).

    All T tokens are computed, as in the base, so that the same kernels round the same way.
    """

    def __init__(
        self,
        runner: MoERunner,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None,
    ) -> None:
        self._runner, self._hidden_states, self._input_ids = runner, hidden_states, input_ids
        self._router_logits = router_logits
        self._logits: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        """Raw logits [T, N]. A runner that owns its gate gets the hidden states in place of logits."""
        if self._logits is None:
            gate = self._runner.gate
            self._logits = self._router_logits if gate is None else gate(self._hidden_states)[0]
        return self._logits

    def weights(self) -> torch.Tensor:
        """Weight of every base expert as the base applies it, [T, N] float32, 0 where not selected."""
        if self._weights is None:
            logits_TN = self.logits()
            weights_TJ, chosen_TJ = self._runner.router._compute_routing(
                self._hidden_states, logits_TN, None, input_ids=self._input_ids
            )
            zeros_TN = torch.zeros(logits_TN.shape, dtype=torch.float32, device=logits_TN.device)
            self._weights = zeros_TN.scatter(1, chosen_TJ.long(), weights_TJ.float())
        return self._weights


def embedded_problem(runner: MoERunner) -> str | None:
    """Why PERFT-E cannot be served on this layer: the base's final weight per expert is not known. None if it is."""
    if runner.is_monolithic:
        kernel = type(runner.routed_experts.quant_method).__name__
        return f"{runner.layer_name} runs a monolithic expert kernel ({kernel}) that hides the base's top-k"
    router = runner.router
    plain = isinstance(router, FusedTopKRouter) or (
        isinstance(router, CPURouter)
        and not router.use_grouped_topk
        and router.custom_routing_function is None
        and router.scoring_func == "softmax"
    )
    if not plain:
        return f"{runner.layer_name} routes by {type(router).__name__}, which scales or groups experts"
    if runner.routed_scaling_factor != 1.0 or runner.routed_experts.apply_router_weight_on_input:
        return f"{runner.layer_name} does not weight its experts' outputs by the router alone"
    return None
