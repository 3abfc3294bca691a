"""After every round of upload, serve and delete a real server holds what it held before (500 of them: `make soak`)."""

from pathlib import Path

import pytest

from tests.server.processes import ServerProcess
from tests.soak.measures import slope
from tests.soak.rounds import SHORT, Rounds, content_for_rounds

SEED = 20261122
ROUNDS = 40


def test_nothing_grows(server: ServerProcess, tmp_path: Path) -> None:
    rounds = Rounds(server, server.log.with_name("store"), content_for_rounds(tmp_path), SEED)
    rounds.run(ROUNDS)
    assert len(rounds.measures) == ROUNDS and rounds.problems(SHORT) == []


@pytest.mark.parametrize("leak", [0, 500_000])
def test_a_growth_is_told_from_noise(leak: int) -> None:
    """Half a megabyte a round shows through jumps of several megabytes up and down; without it nothing does."""
    jumps = [0, 3_000_000, -1_000_000, 0, 500_000, 0, -4_000_000, 20_000, 0, 1_000_000] * 3
    found = slope([700_000_000 + leak * number + jump for number, jump in enumerate(jumps)])
    assert abs(found - leak) < SHORT.api_bytes
