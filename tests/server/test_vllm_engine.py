"""The engine's client on two ranks that answer as `perft.engine.worker` does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapters.ref import AdapterRef
from server.engine import vllm
from server.engine.protocol import AdapterLoadError
from server.engine.vllm import VllmEngine

POET = AdapterRef("poet@1", 1, "PERFT", "d" * 64, Path("/store/poet"))


class TwoRanks:
    """`collective_rpc` of vLLM's client; the second rank fails at `failing`. held: what each rank holds."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing, self.held = failing, [set[str](), set[str]()]
        self.polls = 0

    async def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> list[Any]:
        return [self._answer(rank, method, args) for rank in range(2)]

    def _answer(self, rank: int, method: str, args: tuple[Any, ...]) -> Any:
        held, undone = self.held[rank], {"perft_evict": "perft_place", "perft_drop": "perft_prepare"}
        if method in undone:
            return held.discard(undone[method])
        if method == "perft_outcome":
            self.polls += 1
            return {"state": "done", "reason": None}
        if rank == 1 and method == self.failing:
            return {"state": "failed", "reason": "OSError: rank 1"}
        held.add(method)
        return {"state": "running" if rank == 0 else "done", "reason": None}


@pytest.mark.parametrize("move", ["prepare", "place"])
def test_a_move_ends_when_every_rank_has_done_it(move: str) -> None:
    ranks = TwoRanks()
    asyncio.run(getattr(VllmEngine(ranks), move)(POET))  # type: ignore[arg-type]
    assert ranks.held == [{f"perft_{move}"}] * 2 and ranks.polls == 2


@pytest.mark.parametrize("move", ["prepare", "place"])
def test_what_failed_on_one_rank_stays_on_none(move: str) -> None:
    ranks = TwoRanks(f"perft_{move}")
    with pytest.raises(AdapterLoadError, match="OSError: rank 1"):
        asyncio.run(getattr(VllmEngine(ranks), move)(POET))  # type: ignore[arg-type]
    assert ranks.held == [set(), set()]


@pytest.mark.parametrize("move", ["prepare", "place"])
def test_a_move_that_a_worker_knows_nothing_of_has_failed(move: str) -> None:
    class Forgetful(TwoRanks):
        def _answer(self, rank: int, method: str, args: tuple[Any, ...]) -> Any:
            answer = super()._answer(rank, method, args)
            return {"state": "reported", "reason": None} if method == "perft_outcome" else answer

    ranks = Forgetful()
    with pytest.raises(AdapterLoadError, match="lost the move"):
        asyncio.run(getattr(VllmEngine(ranks), move)(POET))  # type: ignore[arg-type]
    assert ranks.held == [set(), set()]


def test_an_engine_that_hangs_ends_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        async def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> list[Any]:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(vllm, "RPC_TIMEOUT_S", 0.0)
    monkeypatch.setattr(vllm, "PATIENCE_S", 0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(VllmEngine(Hanging()).prepare(POET))  # type: ignore[arg-type]
