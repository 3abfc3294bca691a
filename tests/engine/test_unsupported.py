"""What a VllmConfig may not ask for, each mode by its name; the same check runs in every worker."""

from types import SimpleNamespace as Config

import pytest
from vllm.config import CompilationMode, CUDAGraphMode

from perft.engine.settings import EngineSettings
from perft.engine.unsupported import UnsupportedModeError, check_supported


def config(**changes: object) -> Config:
    """A configuration in which everything is as PERFT needs it, but for `changes`."""
    parallel = {
        "_api_process_count": 1, "data_parallel_size": 1, "pipeline_parallel_size": 1, "enable_expert_parallel": False,
        "enable_eplb": False, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
        "use_ubatching": False,
    }  # fmt: skip
    compilation = {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.NONE}
    rest = {"speculative_config": None, "kv_transfer_config": None, "additional_config": {}}
    return Config(
        parallel_config=Config(**{k: changes.get(k, v) for k, v in parallel.items()}),
        compilation_config=Config(**{k: changes.get(k, v) for k, v in compilation.items()}),
        **{k: changes.get(k, v) for k, v in rest.items()},
    )


def test_what_perft_needs_passes() -> None:
    check_supported(config())


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
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"mode": CompilationMode.VLLM_COMPILE}, "--enforce-eager"),
        ({"cudagraph_mode": CUDAGraphMode.PIECEWISE}, "--enforce-eager"),
    ],
)
def test_an_untested_mode_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModeError, match=named):
        check_supported(config(**changes))


def test_a_forbidden_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(UnsupportedModeError, match="VLLM_SKIP_MODEL_NAME_VALIDATION=1"):
        check_supported(config())


def test_a_setting_that_is_none_of_ours_is_refused() -> None:
    assert EngineSettings.of(config(additional_config={"perft": {"pool_rows": 5}})).pool_rows == 5
    with pytest.raises(ValueError, match=r"found \['pool_row'\]"):
        EngineSettings.of(config(additional_config={"perft": {"pool_row": 5}}))
