"""The killing of the whole server over the fake engine: the real store, registry and routes on real sockets."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.server.fake_server import bearer
from tests.soak.contents import for_the_fake_engine
from tests.soak.kills import Killing, Plan, Report, Running
from tests.soak.zygote import Zygote, zygote

DELAYS: Sequence[Sequence[str]] = ([], [], ["prepare=0.03"], ["prepare=0.01", "forget=0.1"])
"""What the engine takes its time for: a kill then falls between two changes of the store more often."""
KEY = bearer()["Authorization"].removeprefix("Bearer ")


def run(folder: Path, moments: int, seed: int) -> Report:
    """Kill a server `moments` times in `folder`."""
    (folder / "logs").mkdir()
    with zygote(folder / "logs") as parent:
        return kill(parent, folder, moments, seed)


def kill(parent: Zygote, folder: Path, moments: int, seed: int) -> Report:
    store = folder / "store"

    def start(random: Random) -> Running:
        flags = [flag for delay in random.choice(DELAYS) for flag in ("--delay", delay)]
        return parent.start(store, "--rows", "100000", *flags)

    contents = for_the_fake_engine(folder / "contents")
    plan = Plan(start, KEY, contents, completion, moment_s=0.5, starting=0.15, starting_s=0.5)
    return Killing(plan, store, seed).run(moments)


def completion(name: str, random: Random) -> dict[str, Any]:
    return {"model": name, "max_tokens": random.randint(1, 10), "seconds_per_token": random.choice([0, 0.01, 0.03])}
