"""Two real servers of a tiny base, one over a shared store and one over a folder of its own, under traffic of every
kind, and a Prometheus that scrapes them.

More adapters than the device holds, some much busier than others; uploads good and bad, requests that are refused, that
their clients leave, and one adapter whose output is not finite.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from threading import Event, Thread

import httpx

from integration.prometheus import SCRAPE_S, Prometheus, scraping
from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import BASE_NAME, KEY_ARGUMENTS, KEYS, TinyClient

NAMES = (
    "poet", "clerk", "pirate", "lawyer", "tutor", "critic", "chef", "pilot", "judge", "nurse", "broker", "editor",
)  # fmt: skip
BROKEN = "overflow"
"""An adapter whose output is infinite."""
CLIENTS = 7
PAUSE_S = 8.0
"""How long every engine stands still once, in traffic of some minutes."""


@dataclass
class BusyServers:
    """See `busy_servers`. mishaps: what traffic did not expect; its threads go on."""

    servers: list[ServerProcess]
    prometheus: Prometheus
    folder: Path
    mishaps: list[str] = field(default_factory=list)

    def work(self, seconds: float) -> None:
        """Traffic for so long, and two scrapes more. Raises AssertionError if requests failed that must not."""
        ended = Event()
        threads = [Thread(target=self._go_on, args=(ended, number)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            if seconds > 20 * PAUSE_S:
                time.sleep(0.6 * seconds)
                with ExitStack() as stack:
                    for server in self.servers:
                        stack.enter_context(server.engine_stopped())
                    time.sleep(PAUSE_S)
                seconds = 0.4 * seconds - PAUSE_S
            time.sleep(seconds)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert not self.mishaps, self.mishaps[:3]
        time.sleep(2 * SCRAPE_S)

    def _go_on(self, ended: Event, number: int) -> None:
        random = Random(number)
        client = TinyClient(self.servers[number % len(self.servers)].url, KEYS["alice" if number else "admin"])
        chores = self._chores(client, random) if number == 0 else None
        while not ended.wait(random.expovariate(3.0)):
            try:
                next(chores)() if chores else self._ask(client, random)
            except (AssertionError, httpx.HTTPError) as error:
                self.mishaps.append(repr(error))
        client.close()

    def _ask(self, client: TinyClient, random: Random) -> None:
        """One request, mostly for few of the adapters."""
        rank = min(int(random.paretovariate(0.7)) - 1, len(NAMES))
        model = (BASE_NAME, *NAMES)[rank]
        prompt = tiny_server.long_prompt(random.randrange(6), random.randrange(33, 200))
        tokens = random.randrange(4, 80)
        if random.random() < 0.5:
            client.complete(model, prompt, tokens, stop_token_ids=list(range(random.randrange(3, 12))))
            return
        events = client.stream(model, prompt, tokens)
        for seen, _ in enumerate(events):
            if seen > 10 and random.random() < 0.01:
                break
        events.close()  # type: ignore[attr-defined]

    def _chores(self, client: TinyClient, random: Random) -> Iterator[Callable[[], object]]:
        """What the one who looks after the adapters does, and what others get wrong."""
        broken = self.folder / "broken"
        broken.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (broken / file).write_bytes(b"{}")
        nobody = TinyClient(str(client.http.base_url), key=None)
        body = client.body(BROKEN, [5, 6], 2)
        for number in count(len(NAMES) + 1):
            name = random.choice(NAMES)
            folder = tiny_server.adapter(self.folder / f"seed-{number}", number)
            yield lambda name=name, folder=folder: client.upload(name, folder).raise_for_status()  # type: ignore[misc]
            yield lambda name=name, folder=folder: client.upload(name, folder).raise_for_status()  # type: ignore[misc]
            yield lambda: client.upload("poet", broken)
            yield lambda: nobody.refusal("POST", "/v1/completions", json=body)
            yield lambda: client.refusal("POST", "/v1/completions", json=body | {"model": "nix"})
            yield lambda: client.refusal("GET", "/v1/adapters/nix")
            yield lambda: client.http.post("/v1/completions", json=body)


@contextmanager
def busy_servers(folder: Path) -> Iterator[BusyServers]:
    """Both, with their adapters, until the end of the block."""
    model = tiny_server.build_model(folder / "model")
    made = {name: tiny_server.adapter(folder / name, seed) for seed, name in enumerate(NAMES)}
    made[BROKEN] = tiny_server.enormous_adapter(folder / BROKEN)
    small = ("--expert-sampling", "4", "--max-num-seqs", "2")
    shared = ("--adapter-store", f"file://{folder / 'shared'}", "--adapter-cache", str(folder / "cache"))
    started: list[ServerProcess] = []
    try:
        for store in (shared, ()):
            server = tiny_server.start(model, folder / "store", *KEY_ARGUMENTS, *small, *store)
            started.append(server)
            admin = TinyClient(server.url)
            for name, files in made.items():
                admin.upload(name, files).raise_for_status()
            admin.change("poet", pinned=True)
            admin.close()
        with scraping(folder, addresses(started), KEYS["admin"]) as prometheus:
            yield BusyServers(started, prometheus, folder)
    finally:
        for server in started:
            server.stop()


def addresses(servers: Sequence[ServerProcess]) -> list[str]:
    return [server.url.partition("://")[2] for server in servers]
