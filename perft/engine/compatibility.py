"""Owns the modes and switches of vLLM that are refused, each with the reason.

Invariant: a worker serves adapters only in modes that PERFT's layer is tested in.
"""

import os
from collections.abc import Mapping
from typing import Any

UNSAFE_ENVIRONMENT = {
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "it answers unknown adapter names with the base model",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "it opens vLLM's own adapter routes, some of them without a key",
    "VLLM_RAISE_ON_LOGIT_NANS": "it stops the whole engine where one request should fail",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "two requests with the same client-chosen id would be confused",
}
"""Switches that can cause wrong answers: every worker refuses them, also under plain `vllm serve`."""

FORBIDDEN_ENVIRONMENT = UNSAFE_ENVIRONMENT | {
    "VLLM_SERVER_DEV_MODE": "it opens vLLM's development routes, which can change or reset the engine",
    "VLLM_ENABLE_RESPONSES_API_STORE": "it stores responses that every key can read and continue",
    "VLLM_API_KEY": "API keys are set with --api-key LABEL=KEY (PERFT_API_KEYS)",
    "PROMETHEUS_MULTIPROC_DIR": "metrics of deleted adapters could not be removed",
}
"""Switches that our server refuses at startup: the unsafe ones, and those that break its keys or its metrics."""


class UnsupportedModeError(ValueError):
    """The engine runs in a mode in which the answers of adapters are not tested."""

    def __init__(self, problems: list[str]) -> None:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"PERFT adapters are not served in this mode of vLLM:{listed}")


def environment_problems(
    environment: Mapping[str, str] = os.environ, forbidden: Mapping[str, str] = FORBIDDEN_ENVIRONMENT
) -> list[str]:
    """Every forbidden switch that is set, with the reason, and without its value, which may be a secret."""
    return [
        f"{name}: {why}; unset it"
        for name, why in forbidden.items()
        if environment.get(name, "0").lower() not in ("", "0", "false")
    ]


def config_problems(vllm_config: Any) -> list[str]:
    """Every unsupported mode in a `VllmConfig`."""
    parallel = vllm_config.parallel_config
    modes = {
        "several API servers (--api-server-count)": parallel._api_process_count > 1,
        "data parallel (--data-parallel-size)": parallel.data_parallel_size > 1,
        "pipeline parallel (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "expert parallel (--enable-expert-parallel)": parallel.enable_expert_parallel,
        "expert load balancing (--enable-eplb)": parallel.enable_eplb,
        "context parallel (--decode/--prefill-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batches (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "KV transfer (--kv-transfer-config, --kv-offloading-size)": vllm_config.kv_transfer_config is not None,
        "torch.compile or CUDA graphs (without --enforce-eager)": _is_compiled(vllm_config),
    }
    return [f"{mode}: not tested with PERFT yet; leave it off" for mode, is_on in modes.items() if is_on]


def check_supported(vllm_config: Any) -> None:
    """Raises UnsupportedModeError naming every unsupported mode of `vllm_config` and every unsafe switch."""
    problems = environment_problems(forbidden=UNSAFE_ENVIRONMENT) + config_problems(vllm_config)
    if problems:
        raise UnsupportedModeError(problems)


def _is_compiled(vllm_config: Any) -> bool:
    """Whether the model runs compiled or as captured graphs, which would freeze the first step's plan."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return compilation.mode not in (None, CompilationMode.NONE) or graphs
