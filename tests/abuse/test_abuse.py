"""Every attack beside the streams of another tenant, on a real server: nobody else's stream ends or stands still, the
server lives and answers at once afterwards, and keeps no memory.

How long is long depends on the machine: the bounds are far above what an undisturbed server takes on a busy one, and
far below what each attack did to it before it was mended.
"""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.abuse.attacks import ATTACKS, EXPECTED, MODULES
from tests.abuse.conftest import VICTIMS
from tests.abuse.target import ROUND_LIMIT_S, Ends, Target, all_memory
from tests.abuse.witness import Witness
from tests.server.processes import ServerProcess
from tests.server.tiny_server import KEYS

LONGEST_GAP_S = 5.0
MOST_BYTES = 700 * 1024**2
"""What the processes of a server may have more after an attack than before all of them: caches fill once."""


@pytest.fixture(scope="module")
def memory_before(attacked: ServerProcess, target: Target) -> Iterator[int]:
    """Memory once the server has streamed."""
    with Witness(target.url, KEYS["bob"], VICTIMS):
        pass
    yield all_memory(attacked)


def test_each_attack_is_found() -> None:
    assert len(ATTACKS) == sum(len(module.ATTACKS) for module in MODULES), "two have one name"
    assert EXPECTED.keys() <= ATTACKS.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_hurts_nobody_else(name: str, attacked: ServerProcess, target: Target, memory_before: int) -> None:
    with Witness(target.url, KEYS["bob"], VICTIMS) as witness:
        ends: Ends = asyncio.run(ATTACKS[name](target))
    assert attacked.process.poll() is None, f"the server ended with {attacked.process.returncode}"
    assert not witness.seen.failures, (ends, witness.seen)
    assert witness.seen.streams > 0
    assert witness.seen.longest_gap_s < LONGEST_GAP_S, (ends, witness.seen)
    assert "timeout" not in ends, f"a request was not answered in {ROUND_LIMIT_S} s: {ends}"
    assert ends.keys() <= EXPECTED.get(name, ends.keys()), ends
    assert not any(end.startswith("5") for end in ends if end != "503"), ends
    assert httpx.get(f"{target.url}/ready", timeout=ROUND_LIMIT_S).status_code == 200
    assert all_memory(attacked) < memory_before + MOST_BYTES
