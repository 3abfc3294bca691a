"""vLLM's warm-up runs, which an idle data-parallel rank makes beside real requests, leave real adapters alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from tests.engine.engines import TinyEngine, greedy, prompts, start
from tests.engine.test_lora_manager import write_lora

LORA_ID = 2
"""One of the numbers that warm-up runs take."""


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    running = start(
        "mixtral", tmp_path_factory.mktemp("warm-up"), lora_target_modules=["qkv_proj"], max_loras=4, max_lora_rank=8
    )
    yield running
    running.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def answer(engine: TinyEngine, request: LoRARequest | None) -> list[int]:
    (output,) = engine.llm.generate(
        [{"prompt_token_ids": prompts(1, seed=40)[0]}], greedy(8), lora_request=request, use_tqdm=False
    )
    return list(output.outputs[0].token_ids)


def test_a_warm_up_run_leaves_adapters_of_both_kinds_where_they_are(with_lora: TinyEngine, tmp_path: Path) -> None:
    runner: Any = with_lora.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    manager = runner.lora_manager
    lora = LoRARequest("lora@1", LORA_ID, str(write_lora(with_lora, tmp_path / "lora")[0]))
    requests = [None, lora, with_lora.request(0)]
    before = [answer(with_lora, request) for request in requests]
    assert before[0] not in before[1:] and before[1] != before[2]
    held, rows = manager.list_adapters(), manager.pool.used
    assert {lora.lora_int_id, 1} <= held and rows > 0
    read = manager.step_loader.bytes_read
    runner._dummy_run(8, num_active_loras=4)
    assert manager.list_adapters() == held and manager.pool.used == rows
    assert [answer(with_lora, request) for request in requests] == before
    assert manager.step_loader.bytes_read == read, "an adapter was read again"
