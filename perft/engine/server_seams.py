"""Owns what the server depends on inside vLLM: its command line, its API process, and what that asks of the engine.

`seams.py` has the other half, and how both are checked.
"""

from perft.engine.seam_check import BOTH, SUPPORTED_VLLM, Seam, SeamGroup

SERVER_SEAM_GROUPS = (
    SeamGroup(
        breaks="The server could accept PEFT LoRA adapters that vLLM refuses inside a step, which ends the engine.",
        gone_when="vLLM has a public check of an adapter's folder",
        seams=(
            Seam(
                module="vllm.lora.peft_helper",
                name="PEFTHelper.from_dict",
                parameters=("config_dict",),
                use="called: vLLM's own reading of a PEFT configuration",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.peft_helper",
                name="PEFTHelper.validate_legal",
                parameters=("lora_config",),
                use="called: vLLM's own check of a PEFT configuration",
                checked=BOTH,
            ),
            Seam(
                module="vllm.lora.utils",
                name="is_in_target_modules",
                parameters=("module_name", "target_modules"),
                use="called: the modules that the operator opened to LoRA",
                checked=BOTH,
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
                checked=BOTH,
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
                checked=BOTH,
            ),
            Seam(
                module="vllm.renderers.base",
                name="BaseRenderer._tokenize_prompt",
                parameters=("prompt", "params"),
                use="called (private) on a thread of ours: tokenizes one long text",
                checked=BOTH,
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
                checked=BOTH,
            ),
            Seam(
                module="vllm.parser.abstract_parser",
                name="_xgrammar_supports",
                parameters=("structured_outputs",),
                use="replaced (private) in the API process, where it would convert specs on the event loop",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.utils",
                name="choice_as_grammar",
                parameters=("choice",),
                use="called by our validation, as by vLLM's: choices as a grammar",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.utils",
                name="grammar_is_likely_lark",
                parameters=("grammar_str",),
                use="called: whether vLLM would convert a grammar from Lark",
                checked=BOTH,
            ),
            Seam(
                module="vllm.sampling_params",
                name="SamplingParams._validate_structured_outputs",
                parameters=("model_config", "structured_outputs_config", "tokenizer"),
                use="called (private) in the compile process: vLLM's own validation of a spec",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="has_xgrammar_unsupported_json_features",
                parameters=("schema",),
                use="called in the compile process: for the schemas of structural tags, and to name what is missing",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.request",
                name="get_structured_output_key",
                parameters=("params",),
                use="called in the compile process: what the engine compiles for a spec",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output",
                name="XgrammarBackend",
                parameters=("vllm_config", "tokenizer", "vocab_size"),
                use="replaced in the engine by a subclass, whose grammars have a budget",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarBackend.compile_grammar",
                parameters=("request_type", "grammar_spec", "stop_token_ids"),
                use="overridden: compiles at a lower priority and returns our subclass of its grammar",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar",
                parameters=("vocab_size", "matcher", "ctx"),
                use="subclassed: one request's grammar",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar.accept_tokens",
                parameters=("request_id", "tokens"),
                use="overridden: False, with which vLLM ends the request, once the budget is used up",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.structured_output.backend_xgrammar",
                name="XgrammarGrammar.fill_bitmask",
                parameters=("bitmask", "idx"),
                use="overridden: works on a thread that a step waits for only within the budget",
                checked=BOTH,
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
                checked=BOTH,
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
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.engine.core",
                name="EngineCoreProc.run_engine_core",
                use="wrapped: what that process runs; it ends with its parent before vLLM loads plugins, too",
                checked=(SUPPORTED_VLLM,),
            ),
            Seam(
                module="vllm.v1.executor.multiproc_executor",
                name="WorkerProc.make_worker_process",
                use="starts a worker as a process of multiprocessing whose name begins with VllmWorker",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.engine.async_llm",
                name="AsyncLLM.shutdown",
                parameters=("timeout",),
                use="wrapped on the server's one EngineClient: tells that vLLM itself ends the engine",
                checked=BOTH,
            ),
            Seam(
                module="vllm.v1.engine.async_llm",
                name="AsyncLLM.errored",
                use="read: whether the engine died",
                checked=BOTH,
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
                checked=BOTH,
            ),
        ),
    ),
    SeamGroup(
        breaks="`perft serve` could not read its command line, or would leave flags of vLLM's unread.",
        gone_when="vLLM's command line can be extended by a plugin",
        seams=(
            Seam(
                module="vllm.entrypoints.launchers.cli_args",
                name="make_arg_parser",
                parameters=("parser",),
                use="called: adds all of vLLM's flags to our parser",
                checked=BOTH,
                elsewhere=(("0.33.0", "vllm.entrypoints.common.cli_args"),),
            ),
            Seam(
                module="vllm.entrypoints.launchers.cli_args",
                name="validate_parsed_serve_args",
                parameters=("args",),
                use="called: vLLM's own check of its flags",
                checked=BOTH,
                elsewhere=(("0.33.0", "vllm.entrypoints.common.cli_args"),),
            ),
            Seam(
                module="vllm.entrypoints.launchers.utils.constants",
                name="H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT",
                use="read: whether a limit was set that has no effect on our server",
                checked=BOTH,
            ),
            Seam(
                module="vllm.entrypoints.launchers.utils.constants",
                name="H11_MAX_HEADER_COUNT_DEFAULT",
                use="read: whether the other limit was set that has no effect on our server",
                checked=BOTH,
            ),
            Seam(
                module="vllm.utils.argparse_utils",
                name="FlexibleArgumentParser.load_config_file",
                parameters=("file_path",),
                use="overridden in a subclass: repeats our repeated flags, which vLLM passes as one with many values",
                checked=BOTH,
            ),
            Seam(
                module="vllm.entrypoints.launchers.api_server.entry",
                name="run_server_worker",
                parameters=("listen_address", "sock", "args"),
                use="called: vLLM's own server, with our parsed flags; `run_server` without its handler of SIGTERM",
                checked=(SUPPORTED_VLLM,),
            ),
            Seam(
                module="vllm.entrypoints.launchers.launcher",
                name="setup_server",
                parameters=("args", "reuse_port"),
                use="called before: vLLM's check of its flags, and the socket",
                checked=(SUPPORTED_VLLM,),
            ),
            Seam(
                module="vllm.utils.system_utils",
                name="decorate_logs",
                parameters=("process_name", "skip_if_decorated"),
                use="called before: the name of this process in vLLM's log",
                checked=(SUPPORTED_VLLM,),
            ),
        ),
    ),
)
