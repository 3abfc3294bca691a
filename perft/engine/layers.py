"""Owns finding the MoE layers of a loaded vLLM model, and the shape of the base that adapters must fit.

Invariant: either every MoE layer of the model has our class, or the model is refused.
"""

from dataclasses import replace
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from perft.base_model import BaseShape
from perft.checkpoint import checkpoint_fingerprint
from perft.engine.base_router import embedded_problem
from perft.engine.moe_layer import CarryingExperts, CarryingRunner
from perft.operator.base import Sizes

logger = init_logger(__name__)


class UnsupportedModelError(ValueError):
    """PERFT does not carry every MoE layer of this model: an adapter could have no effect, or a wrong one."""


def wrapped_runners(model: torch.nn.Module) -> dict[int, CarryingRunner]:
    """The MoE layers of `model` by decoder layer. Raises UnsupportedModelError if one is not of our classes."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MoERunner)}
    if not found:
        raise UnsupportedModelError(
            f"found no MoE layer in {type(model).__name__}; PERFT adapts Mixture-of-Experts models only"
        )
    foreign = {
        name: f"{type(module).__name__} with {type(module.routed_experts).__name__}"
        for name, module in found.items()
        if not isinstance(module, CarryingRunner) or not isinstance(module.routed_experts, CarryingExperts)
    }
    if foreign:
        name, what = next(iter(foreign.items()))
        raise UnsupportedModelError(
            f"{len(foreign)} of {len(found)} MoE layers of {type(model).__name__} do not carry PERFT's operator "
            f"({name} is a {what}): this model is not supported"
        )
    runners = {module.layer_id: module for module in found.values() if isinstance(module, CarryingRunner)}
    if len(runners) != len(found):
        raise UnsupportedModelError(f"{type(model).__name__} has several MoE layers in one decoder layer")
    for name, runner in found.items():
        if problem := layer_problem(runner):
            raise UnsupportedModelError(f"{name} {problem}: not supported")
    return runners


def layer_problem(runner: MoERunner) -> str | None:
    """Why the delta cannot be added to the output of this layer's experts; None if it can."""
    if runner.moe_config.is_sequence_parallel:
        return "sees a part of the step's tokens (sequence parallel)"
    if runner.moe_config.hidden_dim != runner.moe_config.hidden_dim_unpadded:
        return "pads its hidden states for the experts' kernel"
    if runner.moe_config.use_deferred_moe_finalize:
        return "leaves the sum over its experts to the layer after it"
    if runner.routed_input_transform is not None or runner.routed_output_transform is not None:
        return "runs its experts on a projection of the hidden states (latent MoE)"
    return None


def base_shape(runners: dict[int, CarryingRunner], vllm_config: VllmConfig) -> BaseShape:
    """The shape that an adapter must fit, read off the loaded model."""
    model_config = vllm_config.model_config
    moe_config = next(iter(runners.values())).moe_config
    problems = (embedded_problem(runner) for runner in runners.values())
    output_scales = {float(runner.routed_scaling_factor) for runner in runners.values()}
    if len(output_scales) != 1:
        raise UnsupportedModelError(f"the MoE layers scale their output by different factors: {sorted(output_scales)}")
    slot_problem = None
    if not all(runner.hands_over_logits for runner in runners.values()):
        slot_problem = (
            "vLLM runs it through transformers' own code, which hands over the router's choice, not its logits"
        )
    shape = BaseShape(
        hidden_size=model_config.get_hidden_size(),
        num_layers=model_config.hf_text_config.num_hidden_layers,
        moe_layers=tuple(sorted(runners)),
        num_experts=moe_config.num_logical_experts,
        top_k=moe_config.experts_per_token,
        dtype=model_config.dtype,
        embedded_problem=next((problem for problem in problems if problem), None),
        slot_problem=slot_problem,
        output_scale=output_scales.pop(),
    )
    return replace(shape, fingerprint=_fingerprint(vllm_config, shape))


def step_sizes(base: BaseShape, vllm_config: VllmConfig) -> Sizes:
    """How large an engine's steps get."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    assert vllm_config.lora_config is not None
    return Sizes(
        max_tokens=max(vllm_config.scheduler_config.max_num_batched_tokens, captured),
        max_groups=vllm_config.lora_config.max_loras,
        captured_tokens=captured,
        base_experts=base.num_experts,
        base_top_k=0 if base.embedded_problem else base.top_k,
    )


def _fingerprint(vllm_config: VllmConfig, shape: BaseShape) -> str | None:
    """docs/format.md's base_fingerprint of the served checkpoint; None, with a warning, if the files cannot be read."""
    from huggingface_hub import snapshot_download

    model_config = vllm_config.model_config
    folder = Path(model_config.model)
    try:
        if not folder.is_dir():
            cached = snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=vllm_config.load_config.download_dir,
                local_files_only=True,
            )
            folder = Path(cached)
        fingerprint = checkpoint_fingerprint(folder, shape)
    except (OSError, ValueError) as error:
        logger.warning("PERFT: the checkpoint's files cannot be read (%s)", error)
        fingerprint = None
    if fingerprint is None:
        logger.warning(
            "PERFT: found no router weights in %s: adapters are compared with the base's shape alone, and one that was "
            "trained on another base of this shape is not noticed",
            model_config.model,
        )
    return fingerprint
