"""One engine per kind of model, shared by all tests of the session."""

from collections.abc import Iterator

import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from tests import tiny
from tests.engine.engines import TinyEngine, start


@pytest.fixture(scope="session", params=tiny.KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    """A tiny model of each kind behind vLLM, with PERFT. Tests that take it run once per kind."""
    running = start(request.param, tmp_path_factory.mktemp(request.param))
    yield running
    running.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
