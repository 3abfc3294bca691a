"""A million requests on fleets of servers over one store: no promise is broken; without any one safeguard, some are."""

import asyncio
from pathlib import Path

import pytest

from tests.server import fleet
from tests.server.fleet import Promises, ServerClass, run_fleet
from tests.server.virtual_time import run_virtually

SEEDS = range(4)
ADMISSIONS = 1_000_000


def promises_of(folder: Path, seed: int, make: ServerClass = fleet.Server, **options: float) -> Promises:
    async def run() -> Promises:
        async with asyncio.timeout(100_000):
            return await run_fleet(folder, seed, make, **options)  # type: ignore[arg-type]

    return run_virtually(run())


def test_no_promise_is_broken(tmp_path: Path) -> None:
    found = [promises_of(tmp_path / str(seed), seed) for seed in SEEDS]
    assert not [each for promises in found for each in promises.broken]
    assert sum(promises.admissions for promises in found) >= ADMISSIONS
    assert all(sum(map(len, promises.answered.values())) > 50 and promises.refused > 50 for promises in found)


@pytest.mark.parametrize("make", [fleet.Hasty, fleet.Careless, fleet.Optimist, fleet.Forgetful, fleet.Overhasty])
def test_without_a_safeguard_promises_are_broken(tmp_path: Path, make: ServerClass) -> None:
    assert any(promises_of(tmp_path / str(seed), seed, make).broken for seed in SEEDS)
