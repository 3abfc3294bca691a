"""Two CPU ranks: every variant answers as on one."""

from collections.abc import Iterator

import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from tests.engine.engines import TinyEngine, prompts, start


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    running = start(
        "mixtral",
        tmp_path_factory.mktemp("tensor-parallel"),
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
    )
    yield running
    running.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def test_every_variant_answers_as_on_one_rank(two_ranks: TinyEngine) -> None:
    statuses = two_ranks.llm.collective_rpc("perft_status")
    assert [status["moe_layers"] for status in statuses] == [4, 4]
    requests = [(prompt, case) for case in range(len(two_ranks.cases)) for prompt in prompts(2, seed=case)]
    for (_, case), output in zip(requests, two_ranks.generate(requests), strict=True):
        two_ranks.check(case, output)
