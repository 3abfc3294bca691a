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


SPECULATIVE_METHOD = "ngram"
"""The one method of speculative decoding that is served: its drafts come from the request's own tokens."""


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
    """Every unsupported mode in a `VllmConfig`, with what vLLM does in it that PERFT does not handle."""
    parallel = vllm_config.parallel_config
    context_sizes = (parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    modes = (
        (
            parallel._api_process_count > 1,
            "several API servers (--api-server-count): each would have a table of adapters of its own",
        ),
        (
            parallel.data_parallel_size > 1,
            "data parallel (--data-parallel-size): an order to load reaches every engine, only the first one's answer "
            "comes back, and an idle engine's dummy steps run beside real ones; not run yet",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallel (--pipeline-parallel-size): a rank has a part of the layers, and adapters are checked "
            "against the layers of one rank; not run yet",
        ),
        (
            parallel.enable_expert_parallel,
            "expert parallel (--enable-expert-parallel): a rank has a part of the experts and may see other ranks' "
            "tokens; not run yet",
        ),
        (
            parallel.enable_eplb,
            "expert load balancing (--enable-eplb): the router's numbers are those of copies, not of experts; "
            "not run yet",
        ),
        (
            max(context_sizes) > 1,
            "context parallel (--decode/--prefill-context-parallel-size): a rank sees a part of the tokens that the "
            "step's plan counts; not run yet",
        ),
        (
            parallel.use_ubatching,
            "micro-batches (--enable-dbo, --ubatch-size): a layer runs twice, each time with a part of the tokens that "
            "the step's plan counts; not run yet",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "fast prefill (--kv-sharing-fast-prefill): the later layers see a part of the tokens that the step's plan "
            "counts",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "KV transfer (--kv-transfer-config, --kv-offloading-size): blocks could leave the engine before their "
            "request is found to be invalid; not run yet",
        ),
    )
    problems = [f"{mode}; leave it off" for is_on, mode in modes if is_on]
    speculation = _speculation_problem(vllm_config)
    return [*problems, speculation] if speculation else problems


def _speculation_problem(vllm_config: Any) -> str | None:
    """Why speculative decoding as configured is not served; None if it is, or if there is none."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    if speculative.method != SPECULATIVE_METHOD:
        return (
            f"speculative decoding (--speculative-config) with method {speculative.method!r}: drafts would come from a "
            f"model that knows no adapter, which has not been run yet; use {SPECULATIVE_METHOD!r}, or leave it off"
        )
    if vllm_config.use_v2_model_runner:
        return (
            "speculative decoding (--speculative-config) on vLLM's V2 model runner: it counts the NaNs of a request's "
            "first rows of logits as another's, so the wrong request would fail; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    return None


def check_supported(vllm_config: Any) -> None:
    """Raises UnsupportedModeError naming every unsupported mode of `vllm_config` and every unsafe switch."""
    problems = environment_problems(forbidden=UNSAFE_ENVIRONMENT) + config_problems(vllm_config)
    if problems:
        raise UnsupportedModeError(problems)
