"""Sixteen streams run while adapters are uploaded, activated, deleted and crowd the pool: no stream sees any of it.

Every stream's prompt has a clear lead under each version it may meet (see `streams`), so its tokens are compared
exactly with those it gets when nothing else happens.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event

import pytest

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.streams import Case, Watched, answer_and_lead, clear_case, is_clear, upload_version, watch
from tests.server.tiny_server import BASE_NAME, KEYS, Samples, TinyClient

STREAMED = [f"streamed-{number}" for number in range(5)]
STREAMS = [[*STREAMED, BASE_NAME][number % 6] for number in range(16)]
TOKENS = 200
GUEST_PROMPT, GUEST_TOKENS = [5, 9, 42], 8


@pytest.fixture
def client(server: ServerProcess) -> Iterator[TinyClient]:
    client = TinyClient(server.url, KEYS["admin"])
    yield client
    client.remove(*(adapter["name"] for adapter in client.http.get("/v1/adapters").json()["data"]))
    client.close()


@dataclass
class Folders:
    """Adapter folders with contents that are all different."""

    root: Path
    made: int = 0

    def new(self) -> Path:
        self.made += 1
        return tiny_server.adapter(self.root / str(self.made), seed=1000 + self.made)


@dataclass
class Changes:
    """Everything that happens beside the streams: 50 uploads, 20 activations, 20 deletes, in five rounds.

    Each round gives one streamed name its second version. guests: versions nobody streams, that stay.
    """

    client: TinyClient
    folders: Folders
    second: dict[str, Path]
    given: dict[str, list[str]] = field(default_factory=dict)
    guests: list[str] = field(default_factory=list)
    uploads: int = 0
    activations: int = 0
    deletes: int = 0

    def make(self) -> None:
        for number, streamed in enumerate(STREAMED):
            before, after = self.given[streamed][-1], self.upload(streamed, self.second[streamed])
            self.activate(after)
            first, second, third = (f"guest-{number}-{letter}" for letter in "abc")
            old, active, other = (self.upload(first, self.folders.new()) for _ in range(3))
            self.activate(before)
            unused, unwanted, staying = (self.upload(second, self.folders.new()) for _ in range(3))
            for _ in range(3):
                self.upload(third, self.folders.new())
            self.activate(active)
            self.guests += [active, other, staying]
            for version in (old, unused, unwanted):
                self.delete("{}/versions/{}".format(*version.split("@")))
            self.delete(third)
            self.activate(after)

    def upload(self, name: str, folder: Path) -> str:
        version = upload_version(self.client, name, folder, activate=False)
        self.given.setdefault(name, []).append(version)
        self.uploads += 1
        return version

    def activate(self, version: str) -> None:
        name, _, number = version.partition("@")
        assert self.client.change(name, active=int(number))["active"] == int(number)
        self.activations += 1

    def delete(self, path: str) -> None:
        response = self.client.http.delete(f"/v1/adapters/{path}")
        assert response.status_code == 202, response.text
        self.deletes += 1


def stream_on(client: TinyClient, name: str, prompt: list[int], begun: Event, changed: Event) -> list[Watched]:
    """One stream after the other, until one has begun after all changes. begun: set once the first one has."""
    seen: list[Watched] = []
    is_last = False
    while not is_last:
        is_last = changed.is_set()
        seen.append(watch(client, name, prompt, TOKENS, begun))
    return seen


def ask_guests(changes: Changes, changed: Event, seed: int) -> list[tuple[str, list[int]]]:
    """Answers of versions that crowd the pool, of more than it holds."""
    random, answers = Random(seed), []
    while not changed.is_set() or len({model for model, _ in answers}) <= tiny_server.POOL_ADAPTERS:
        if not changes.guests:
            changed.wait(0.05)
            continue
        answer = changes.client.complete(random.choice(changes.guests), GUEST_PROMPT, GUEST_TOKENS)
        answers.append((answer.model, answer.tokens))
    return answers


def test_streams_do_not_notice_what_happens_beside_them(client: TinyClient, tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    second = {name: folders.new() for name in STREAMED}
    changes = Changes(client, folders, second)
    first_version = {name: upload_version(client, name, folders.new()) for name in STREAMED}
    changes.given = {name: [version] for name, version in first_version.items()}
    rehearsed = {name: upload_version(client, f"rehearsed-{name}", second[name]) for name in STREAMED}

    def undisturbed(number: int) -> Case:
        """What stream `number` asks, and the answers its versions give to that while nothing else happens."""
        name = STREAMS[number]
        models = [BASE_NAME] if name == BASE_NAME else [first_version[name], rehearsed[name]]
        return clear_case(client, models, TOKENS, number)

    with ThreadPoolExecutor(len(STREAMS) + 2) as threads:
        cases = list(threads.map(undisturbed, range(len(STREAMS))))
        client.remove(*(f"rehearsed-{name}" for name in STREAMED))
        before, changed = Samples.of(client.metrics()), Event()
        begun = [Event() for _ in STREAMS]
        streams = [
            threads.submit(stream_on, client, name, case.prompt, first_begun, changed)
            for name, case, first_begun in zip(STREAMS, cases, begun, strict=True)
        ]
        guests = [threads.submit(ask_guests, changes, changed, seed) for seed in range(2)]
        try:
            assert all(each.wait(LIMIT_S) for each in begun), "a stream on the first version"
            changes.make()
        finally:
            changed.set()
        seen = [stream.result() for stream in streams]
        guests_answers = [answer for guest in guests for answer in guest.result()]
    during = Samples.of(client.metrics()) - before

    assert (changes.uploads, changes.activations, changes.deletes) == (50, 20, 20)
    met: dict[str, set[str]] = {}
    for name, case, watched in zip(STREAMS, cases, seen, strict=True):
        versions = changes.given.get(name, [BASE_NAME])
        expected = dict(zip(versions, case.answers.values(), strict=True))
        for stream in watched:
            assert (stream.error, stream.finish_reason) == (None, "length")
            assert stream.tokens == expected[stream.model], (name, stream.model)
            met.setdefault(name, set()).add(stream.model)
    assert met == {BASE_NAME: {BASE_NAME}} | {name: set(changes.given[name]) for name in STREAMED}
    assert during.total("perft_step_load_bytes_total") == 0
    assert during.total("perft_adapter_evictions_total", tier="device") > 0
    assert_guests_answered_right(client, guests_answers)


def assert_guests_answered_right(client: TinyClient, answers: list[tuple[str, list[int]]]) -> None:
    """As they answer alone, where that stands clear of rounding."""
    models = sorted({model for model, _ in answers})
    assert len(models) > tiny_server.POOL_ADAPTERS
    alone = {model: answer_and_lead(client, model, GUEST_PROMPT, GUEST_TOKENS) for model in models}
    clear = {model: tokens for model, (tokens, lead) in alone.items() if is_clear(lead)}
    assert len(clear) > len(models) / 2
    assert all(tokens == clear[model] for model, tokens in answers if model in clear)
