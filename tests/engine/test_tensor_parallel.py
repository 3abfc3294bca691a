"""Two CPU ranks: every variant answers as on one."""

from collections.abc import Iterator

import numpy as np
import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from perft.engine.tensor_parallel import Share
from perft.operator.base import TILE_TOKENS
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_token_is_added_by_one_rank_in_whole_tiles(ranks: int) -> None:
    groups = [np.arange(100, 100 + size) for size in (1, 1, 40, 16, 3)]
    tile, loads = 0, [0] * ranks
    for tokens_n in groups:
        parts = [Share(rank, ranks).of_tokens(tokens_n, tile) for rank in range(ranks)]
        assert sorted(np.concatenate(parts).tolist()) == tokens_n.tolist()
        for rank, part in enumerate(parts):
            loads[rank] += len(part)
        tile += -(-len(tokens_n) // TILE_TOKENS)
    if ranks == 2:
        assert min(loads) >= 20, "small groups begin with another rank each"
