"""Owns on which MoE layers PERFT-E can be served: those that hand over the weight which each base expert gets."""

from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def embedded_problem(runner: MoERunner) -> str | None:
    """Why PERFT-E cannot be served on this layer: the base's final weight per expert is not known. None if it is."""
    if runner.is_monolithic:
        kernel = type(runner.routed_experts.quant_method).__name__
        return (
            f"{runner.layer_name} runs a monolithic expert kernel ({kernel}) that hides the base's top-k: start with "
            "--moe-backend triton"
        )
    if runner.routed_experts.apply_router_weight_on_input:
        return f"{runner.layer_name} weights its experts' inputs, not their outputs, by the router"
    return None
