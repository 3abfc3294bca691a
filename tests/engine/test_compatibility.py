"""The modes and switches of vLLM that are refused, each by its name; every worker runs this check."""

from types import SimpleNamespace as Config

import pytest
from vllm.config import CompilationMode, CUDAGraphMode

from perft.engine.compatibility import (
    FORBIDDEN_ENVIRONMENT,
    UNSAFE_ENVIRONMENT,
    UnsupportedModeError,
    check_supported,
    environment_problems,
)
from perft.engine.settings import EngineSettings

NGRAM = Config(method="ngram")


def config(**changes: object) -> Config:
    """A configuration in which everything is as PERFT needs it, but for `changes`."""
    parallel = {
        "_api_process_count": 1, "data_parallel_size": 1, "pipeline_parallel_size": 1, "enable_expert_parallel": False,
        "enable_eplb": False, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
        "use_ubatching": False,
    }  # fmt: skip
    compilation = {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.NONE}
    rest = {
        "speculative_config": None, "kv_transfer_config": None, "additional_config": {}, "use_v2_model_runner": False,
    }  # fmt: skip
    return Config(
        cache_config=Config(kv_sharing_fast_prefill=changes.get("kv_sharing_fast_prefill", False)),
        parallel_config=Config(**{k: changes.get(k, v) for k, v in parallel.items()}),
        compilation_config=Config(**{k: changes.get(k, v) for k, v in compilation.items()}),
        **{k: changes.get(k, v) for k, v in rest.items()},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"speculative_config": NGRAM},
        {"mode": CompilationMode.VLLM_COMPILE, "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE},
    ],
)
def test_a_mode_that_is_served_passes(changes: dict[str, object]) -> None:
    check_supported(config(**changes))


def test_every_mode_that_is_on_is_named_at_once() -> None:
    with pytest.raises(UnsupportedModeError) as refused:
        check_supported(config(enable_eplb=True, use_ubatching=True, speculative_config=Config(method="medusa")))
    assert all(flag in str(refused.value) for flag in ("--enable-eplb", "--enable-dbo", "--speculative-config"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_api_process_count": 2}, "--api-server-count"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"decode_context_parallel_size": 2}, "context parallel"),
        ({"prefill_context_parallel_size": 2}, "context parallel"),
        ({"use_ubatching": True}, "--ubatch-size"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"speculative_config": Config(method="eagle3")}, r"--speculative-config\) with method 'eagle3'"),
        ({"speculative_config": Config(method="draft_model")}, r"--speculative-config\) with method 'draft_model'"),
        ({"speculative_config": Config(method="ngram_gpu")}, r"--speculative-config\) with method 'ngram_gpu'"),
        ({"speculative_config": NGRAM, "use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    ],
)
def test_an_untested_mode_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModeError, match=named):
        check_supported(config(**changes))


@pytest.mark.parametrize("name", UNSAFE_ENVIRONMENT)
def test_a_switch_that_endangers_answers_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedModeError, match=name):
        check_supported(config())


@pytest.mark.parametrize("name", sorted(FORBIDDEN_ENVIRONMENT.keys() - UNSAFE_ENVIRONMENT.keys()))
def test_what_only_our_server_refuses_passes_in_a_worker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under plain `vllm serve` keys, development routes and metrics are its operator's."""
    monkeypatch.setenv(name, "1")
    check_supported(config())


def test_our_server_refuses_both_and_prints_no_value() -> None:
    problems = environment_problems(dict.fromkeys(FORBIDDEN_ENVIRONMENT, "a-secret"))
    assert [problem.partition(":")[0] for problem in problems] == list(FORBIDDEN_ENVIRONMENT)
    assert "VLLM_API_KEY" in FORBIDDEN_ENVIRONMENT and not any("a-secret" in problem for problem in problems)
    assert FORBIDDEN_ENVIRONMENT.keys() > UNSAFE_ENVIRONMENT.keys()
    assert not environment_problems(dict.fromkeys(FORBIDDEN_ENVIRONMENT, "0"))


def test_a_setting_that_is_none_of_ours_is_refused() -> None:
    assert EngineSettings.of(config(additional_config={"perft": {"pool_rows": 5}})).pool_rows == 5
    with pytest.raises(ValueError, match=r"found \['pool_row'\]"):
        EngineSettings.of(config(additional_config={"perft": {"pool_row": 5}}))
