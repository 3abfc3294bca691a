"""Owns THE MoE LAYER: vLLM's MoE runner and routed experts, plus the PERFT delta of the adapters in the step.

The delta is computed and added inside vLLM's opaque MoE op, where the base's experts run: Dynamo traces nothing of
ours, and the base's own top-k is at hand. Invariant: in a step without adapters the layer IS the base's; with them,
the rows of tokens without an adapter are exactly the base's.
"""

from dataclasses import dataclass
from typing import Any

import torch

from perft.operator import Delta, Step
from perft.routing import weights_by_expert


@dataclass
class StepState:
    """What all MoE layers of a worker share: the planned step (None: the base only)."""

    step: Step | None = None


class LayerState:
    """One MoE layer's part: its place in the model, and what its router said in this step (a `BaseRouter`)."""

    def __init__(self, shared: StepState, layer: int, num_experts: int) -> None:
        self.shared, self.layer, self.num_experts = shared, layer, num_experts
        self.logits_TN: torch.Tensor | None = None
        self.top_TJ: tuple[torch.Tensor, torch.Tensor] | None = None

    def start(self, x_TD: torch.Tensor, top_TJ: tuple[torch.Tensor, torch.Tensor] | None) -> Delta | None:
        """Begin the delta of this layer's input; `top_TJ` are the base's weights and experts, None if it hides them."""
        step = self.shared.step
        self.top_TJ = top_TJ
        return None if step is None else step.start(self.layer, x_TD, self)

    def add(self, delta: Delta | None, output_TD: Any) -> Any:
        """The experts' output with the delta added."""
        if delta is not None:
            delta(output_TD)
        self.logits_TN = self.top_TJ = None
        return output_TD

    def logits(self) -> torch.Tensor:
        assert self.logits_TN is not None, "the runner's _apply_quant_method has not run"
        return self.logits_TN[:, : self.num_experts]

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.top_TJ is not None, "PERFT-E is refused where the kernel hides the base's top-k"
        return self.top_TJ

    def weights(self) -> torch.Tensor:
        return weights_by_expert(*self.top(), self.num_experts)


class CarryingRunner:
    """What makes an MoERunner ours: it keeps its router's logits for the layer.

    `perft` is None until a manager attaches its state.
    """

    perft: LayerState | None = None
    hands_over_logits = True
    """Whether what reaches `_apply_quant_method` are the base router's logits."""
    routed_experts: Any
    moe_config: Any
    routed_scaling_factor: float
    layer_id: int
    _shared_experts: Any

    def attach(self, state: LayerState) -> None:
        """Have this layer add the delta of every planned step."""
        self.perft = self.routed_experts.perft = state

    def _select_forward(self) -> Any:
        """Where the model is compiled: the opaque op on every platform (vLLM's CPU would trace through it)."""
        from vllm.config import CompilationMode, get_current_vllm_config

        if get_current_vllm_config().compilation_config.mode in (None, CompilationMode.NONE):
            return super()._select_forward()  # type: ignore[misc]
        ops = torch.ops.vllm
        return ops.moe_forward if self._shared_experts is None else ops.moe_forward_shared

    def _apply_quant_method(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's own; hidden_states [T, D], router_logits [T, N] as the base's router gave them."""
        if self.perft is not None and self.perft.shared.step is not None:
            self.perft.logits_TN = router_logits
        return super()._apply_quant_method(hidden_states, router_logits, *args, **kwargs)  # type: ignore[misc]


class CarryingExperts:
    """What makes RoutedExperts ours: they add the delta to their output, before that is scaled or reduced over ranks.

    They pick their kernels as if LoRA were off: PERFT never changes the inside of a base expert.
    """

    perft: LayerState | None = None

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any) -> None:
        moe_config.is_lora_enabled = False
        super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)  # type: ignore[call-arg]

    def forward_modular(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The experts' output [T, D] for x [T, D] and the base's weights and experts [T, J], plus the delta.

        The delta is begun first, because the kernels may overwrite `x`.
        """
        state = self.perft
        if state is None or state.shared.step is None:
            return super().forward_modular(x, topk_weights, topk_ids, *args, **kwargs)  # type: ignore[misc]
        delta = state.start(x, (topk_weights, topk_ids))
        output = super().forward_modular(x, topk_weights, topk_ids, *args, **kwargs)  # type: ignore[misc]
        return state.add(delta, output)

    def forward_monolithic(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same where the kernel routes by itself."""
        state = self.perft
        if state is None or state.shared.step is None:
            return super().forward_monolithic(x, *args, **kwargs)  # type: ignore[misc]
        delta = state.start(x, None)
        return state.add(delta, super().forward_monolithic(x, *args, **kwargs))  # type: ignore[misc]
