"""Owns the classes that stand in for vLLM's MoE layers: its own, and those that it subclasses for some models.

vLLM replaces a class by its name, so that each of its subclasses needs one of ours.
"""

from typing import Any

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.transformers.moe import TransformersMoERunner, TransformersRoutedExperts

from perft.engine.moe_layer import CarryingExperts, CarryingRunner


class PerftMoERunner(CarryingRunner, MoERunner):
    """Of nearly every model."""


class PerftRoutedExperts(CarryingExperts, RoutedExperts):
    """Of nearly every model."""


class PerftGptOssRoutedExperts(CarryingExperts, GptOssRoutedExperts):
    """gpt-oss loads its experts one by one."""


class PerftTransformersMoERunner(CarryingRunner, TransformersMoERunner):
    """Of a model that vLLM runs through transformers' own code: it is handed the router's choice, not its logits."""

    hands_over_logits = False


class PerftTransformersRoutedExperts(CarryingExperts, TransformersRoutedExperts):
    """Its experts."""


REPLACED: dict[str, Any] = {
    "MoERunner": PerftMoERunner,
    "RoutedExperts": PerftRoutedExperts,
    "GptOssRoutedExperts": PerftGptOssRoutedExperts,
    "TransformersMoERunner": PerftTransformersMoERunner,
    "TransformersRoutedExperts": PerftTransformersRoutedExperts,
}


def install_layer_classes() -> None:
    """Register our classes in vLLM's table of replaced layers, once per process."""
    from vllm.model_executor.custom_op import op_registry_oot

    for name, layer_class in REPLACED.items():
        if op_registry_oot.get(name) is not layer_class:
            layer_class.register_oot(layer_class, name=name)
