"""The killing of `perft serve` itself on a tiny model, engine process and all: it also answers as before."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess, free_port, launch
from tests.server.tiny_server import KEY_ARGUMENTS, KEYS, long_prompt, serve_arguments
from tests.soak.contents import for_the_tiny_model
from tests.soak.kills import Killing, Plan, Report, Running
from tests.soak.model import WrongError

PROMPT, TOKENS = long_prompt(7, 40), 12
FLAGS = ["--drain-timeout-s", "5", "--load-timeout-s", "3600"]
"""A delete may cut off what runs; a load may take as long as a busy machine needs."""


@dataclass
class RealServer:
    """A server with its engine, of which only the first process is killed."""

    process: ServerProcess

    @property
    def url(self) -> str:
        return self.process.url

    def wait_until_ready(self) -> None:
        self.process.wait_until("/ready")

    def kill(self) -> None:
        """SIGKILL to the process of the API alone; every process that it had started must end with it."""
        if self.process.process.poll() is not None:
            return
        started = psutil.Process(self.process.process.pid).children(recursive=True)
        self.process.process.kill()
        self.process.process.wait()
        _, alive = psutil.wait_procs(started, LIMIT_S)
        left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        if left:
            raise WrongError(f"outlived the kill of their parent: {left}")


@dataclass
class Answers:
    """The tokens by which a content is known, from the first answer on."""

    by_digest: dict[str, list[int]]

    def look(self, http: httpx.Client, adapters: list[dict[str, Any]]) -> None:
        """Every version of every adapter still answers as its content always did."""
        for adapter in adapters:
            for version in adapter["versions"]:
                body = tiny_server.TinyClient.body(version["id"], PROMPT, TOKENS)
                answer = http.post("/v1/completions", json=body).raise_for_status().json()
                found = answer["choices"][0]["token_ids"]
                known = self.by_digest.setdefault(version["digest"], found)
                if found != known:
                    raise WrongError(f"{version['id']}: found tokens {found}, before the kill {known}")


def run(model: Path, folder: Path, moments: int, seed: int) -> tuple[Report, int]:
    """Kill a server `moments` times; the report, and how many contents were told apart by their answers."""
    store, answers = folder / "store", Answers({})

    def start(_: Random) -> Running:
        port = free_port()
        arguments = serve_arguments(model, store, port, *KEY_ARGUMENTS, *FLAGS)
        return RealServer(launch(arguments, port, folder / f"server-{port}.log"))

    contents = for_the_tiny_model(folder / "contents", 5)
    plan = Plan(start, KEYS["admin"], contents, completion, moment_s=4.0, changers=3, names_each=2, may_pin=False)
    killing = Killing(plan, store, seed, answers.look)
    report = killing.run(moments)
    return report, len({tuple(tokens) for tokens in answers.by_digest.values()})


def completion(name: str, random: Random) -> dict[str, Any]:
    prompt = long_prompt(random.randrange(1000), 20)
    return tiny_server.TinyClient.body(name, prompt, random.randint(1, 30))
