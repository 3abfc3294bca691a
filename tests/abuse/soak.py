"""All attacks at once, again and again, beside the streams of another tenant (`benchmarks/soak.py --only abuse`)."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.abuse.attacks import ATTACKS
from tests.abuse.conftest import VICTIMS, prepare
from tests.abuse.target import Ends, Target, all_memory
from tests.abuse.witness import Seen, Witness
from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import KEYS

PHASES = 4
"""The memory is measured after each, while nothing is sent."""
QUIET_S = 15.0
MOST_GROWTH = 300 * 1024**2
"""Bytes that the server may have more after the last phase than after the first."""


@dataclass
class Abuse:
    """What came out. ends: by attack. memory: bytes of the server's processes after each phase. seen: the witness of
    each phase. rounds: of all attacks."""

    ends: dict[str, Ends] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    rounds: int = 0

    def problems(self) -> list[str]:
        """Everything that must not be."""
        found = [
            f"phase {number}: {seen.streams} streams, {len(seen.failures)} failures: {seen.failures[:3]}"
            for number, seen in enumerate(self.seen, 1)
            if seen.failures or not seen.streams
        ]
        if self.memory[-1] > self.memory[0] + MOST_GROWTH:
            found.append(f"the memory grew from {self.memory[0]} to {self.memory[-1]} bytes")
        for name, ends in self.ends.items():
            found += [f"{name}: {end} x {count}" for end, count in ends.items() if end[:1] == "5" and end != "503"]
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "rounds of attacks": self.rounds,
            "ends": {name: dict(sorted(ends.items())) for name, ends in sorted(self.ends.items())},
            "streams of the other tenant": sum(seen.streams for seen in self.seen),
            "longest gap in one (s)": [round(seen.longest_gap_s, 2) for seen in self.seen],
            "longest wait for a first token (s)": [round(seen.longest_first_s, 2) for seen in self.seen],
            "memory after each phase (MB)": [round(bytes_ / 1e6) for bytes_ in self.memory],
        }


def run(folder: Path, seconds: float) -> Abuse:
    """Serve a tiny model under attack for `seconds`. Raises AssertionError if the server ends."""
    model = tiny_server.build_model(folder / "model")
    server = tiny_server.start(model, folder / "store", *tiny_server.KEY_ARGUMENTS)
    found = Abuse({name: Counter() for name in ATTACKS})
    try:
        target = prepare(server, folder / "contents")
        for _ in range(PHASES):
            with Witness(target.url, KEYS["bob"], VICTIMS) as witness:
                asyncio.run(_attack(target, server, time.monotonic() + seconds / PHASES, found))
            assert server.process.poll() is None, f"the server ended with {server.process.returncode}"
            found.seen.append(witness.seen)
            time.sleep(QUIET_S)
            found.memory.append(all_memory(server))
    finally:
        server.stop()
    return found


async def _attack(target: Target, server: ServerProcess, until: float, found: Abuse) -> None:
    """Every attack round after round, all at once."""

    async def repeat(name: str) -> None:
        while time.monotonic() < until and server.process.poll() is None:
            found.ends[name] += await ATTACKS[name](target)
            found.rounds += 1

    await asyncio.gather(*map(repeat, ATTACKS))
