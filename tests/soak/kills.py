"""Kill -9 at seeded moments: after every restart the store is sound and says what its clients were told.

One store lives through all of it. `Clients` change it until the server's process group is dead; the models of their
names (see `model`) know what was acknowledged, and what is in doubt.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from adapters.store import verify_folder
from tests.server.processes import LIMIT_S, unfinished_upload, wait_until
from tests.soak.clients import Asker, Changer, http_client, outcome
from tests.soak.model import Change, NameModel, WrongError
from tests.store_contents import Content

ACKNOWLEDGED_FIRST = {"upload", "delete"}
"""Kinds of changes that the first disturbed life waits for, however slow the machine is."""
HALF_AN_UPLOAD = 0.25
"""The part of the kills that are sure to find an upload under way."""


class Running(Protocol):
    """A server that can be killed."""

    @property
    def url(self) -> str: ...

    def wait_until_ready(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How the killing goes. start: begins a server (it need not be ready). moment_s: the longest time until a kill.

    starting: the part of the kills that hit a server while it starts, within starting_s. ask: the body of a completion;
    with it the bare names are tried after each restart too.
    """

    start: Callable[[Random], Running]
    key: str
    contents: Sequence[Content]
    ask: Callable[[str, Random], dict[str, Any]]
    moment_s: float
    starting: float = 0.0
    starting_s: float = 0.0
    changers: int = 4
    names_each: int = 2
    may_pin: bool = True


@dataclass
class Report:
    """What was seen. in_doubt: (kind of change, what became of it) of those that got no answer."""

    moments: int = 0
    while_starting: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    in_doubt: Counter[tuple[str, str]] = field(default_factory=Counter)
    draining: int = 0
    staged: int = 0
    completions: Counter[int] = field(default_factory=Counter)
    start_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "moments": self.moments,
            "of them while the server started": self.while_starting,
            "moments that found something in staging/": self.staged,
            "moments that found a delete under way": self.draining,
            "acknowledged changes": dict(self.acknowledged),
            "changes without an answer, and what became of them": {
                f"{kind}: {became}": count for (kind, became), count in sorted(self.in_doubt.items())
            },
            "completions by status": dict(self.completions),
            "start to ready, median s": round(statistics.median(self.start_s), 3),
            "seconds": round(self.seconds, 1),
        }


Look = Callable[[httpx.Client, list[dict[str, Any]]], None]


class Killing:
    """One store and its clients. `run` kills so many times.

    look: looks closer at what a server serves after each start; a name that nobody changes then holds every content
    from the first start on.
    """

    def __init__(self, plan: Plan, store: Path, seed: int, look: Look | None = None) -> None:
        self.plan, self.store, self.seed, self.look = plan, store, seed, look
        self.random = Random(seed)
        self.report = Report()
        self.by_digest = {content.digest: content for content in plan.contents}
        self.models = [NameModel(f"name-{n}") for n in range(plan.changers * plan.names_each)]
        self.kept = NameModel("kept")
        self.doubts: list[tuple[str, NameModel, Change]] = []

    def run(self, moments: int) -> Report:
        """Raises AssertionError with the seed, the moment and what was done to each name."""
        began = time.monotonic()
        try:
            while self.report.moments < moments:
                self._one_life()
                self.report.moments += 1
            self._last_life()
        except Exception as error:
            told = "\n".join(str(model) for model in [*self.models, self.kept])
            raise AssertionError(f"seed {self.seed}, moment {self.report.moments}: {error}\n{told}") from error
        self.report.seconds = time.monotonic() - began
        return self.report

    def _one_life(self) -> None:
        server = self.plan.start(self.random)
        try:
            if self.random.random() < self.plan.starting:
                time.sleep(self.random.uniform(0, self.plan.starting_s))
                self.report.while_starting += 1
            else:
                self._wait(server)
                if self.look is not None and not self.report.moments:
                    self._fill_kept(server)
                self._check(server)
                self._disturb(server)
        finally:
            server.kill()
        self._check_folder()

    def _last_life(self) -> None:
        server = self.plan.start(self.random)
        try:
            self._wait(server)
            self._check(server)
        finally:
            server.kill()
        self._check_folder()
        self._check_audit()

    def _wait(self, server: Running) -> None:
        began = time.monotonic()
        server.wait_until_ready()
        self.report.start_s.append(time.monotonic() - began)

    def _fill_kept(self, server: Running) -> None:
        with http_client(server.url, self.plan.key) as http:
            changer = Changer(http, [self.kept], self.plan.contents, self.random)
            for content in self.plan.contents:
                changer.upload(self.kept, content, activate=True)

    def _disturb(self, server: Running) -> None:
        """Clients at work, and the kill."""
        plan = self.plan
        http = http_client(server.url, plan.key)
        names = [model.name for model in self.models]
        changers = [
            Changer(http, self.models[n :: plan.changers], plan.contents, Random(self.random.random()), plan.may_pin)
            for n in range(plan.changers)
        ]
        asker = Asker(http, names, Random(self.random.random()), plan.ask)
        clients: list[Changer | Asker] = [*changers, asker]
        is_first = not self.report.acknowledged
        with ThreadPoolExecutor(len(clients)) as pool, ExitStack() as stack:
            if self.random.random() < HALF_AN_UPLOAD or is_first:
                port = urlsplit(server.url).port
                assert port is not None
                stack.enter_context(unfinished_upload(port, plan.key, self.store))
            ends = [pool.submit(client.run) for client in clients]
            try:
                if is_first:
                    wait_until(lambda: self._has_begun(changers) or any(end.done() for end in ends), 0.01)
                time.sleep(self.random.uniform(0, plan.moment_s))
            finally:
                killed_at = time.monotonic()
                server.kill()
            for end in ends:
                end.result()
        http.close()
        for client in clients:
            if client.cut_at is None or client.cut_at < killed_at:
                raise WrongError("a connection broke while the server lived")
        self.doubts = [changer.doubt for changer in changers if changer.doubt is not None]
        for changer in changers:
            self.report.acknowledged.update(changer.answered)
        self.report.completions.update(asker.statuses)

    @staticmethod
    def _has_begun(changers: Sequence[Changer]) -> bool:
        return {kind for changer in changers for kind in list(changer.answered)} >= ACKNOWLEDGED_FIRST

    def _check_folder(self) -> None:
        """What is on disk while nobody runs: sound, whatever else a kill leaves there."""
        problems = verify_folder(self.store) if (self.store / "STORE.json").exists() else []
        if problems:
            raise WrongError(f"verify: {problems}")
        self.report.staged += any((self.store / "staging").glob("*"))

    def _check(self, server: Running) -> None:
        """What the server says and gives is what was acknowledged; what was in doubt is known from now on."""
        with http_client(server.url, self.plan.key) as http:
            seen = self._listed(http)
            self.report.draining += any(v["state"] == "draining" for o in seen.values() for v in o["versions"])
            self._agree(seen)
            seen = self._settled(http)
            self._agree(seen)
            self._check_bytes(http, seen)
            self._check_rest(seen)
            for name, adapter in seen.items():
                self._check_answer(http, name, adapter["active"])
            if self.look is not None:
                self.look(http, list(seen.values()))

    def _agree(self, seen: dict[str, dict[str, Any]]) -> None:
        models = [*self.models, self.kept]
        unknown = seen.keys() - {model.name for model in models}
        if unknown:
            raise WrongError(f"nobody made {unknown}")
        doubts = {model.name: (kind, change) for kind, model, change in self.doubts}
        self.doubts = []
        for model in models:
            place = model.agree(seen.get(model.name))
            if model.name in doubts:
                kind, change = doubts[model.name]
                became = outcome(change, place)
                self.report.in_doubt[kind, became] += 1
                model.history.append(f"restart: {became}")

    @staticmethod
    def _listed(http: httpx.Client) -> dict[str, dict[str, Any]]:
        answer = http.get("/v1/adapters", params={"limit": 1000}).raise_for_status().json()
        return {adapter["name"]: adapter for adapter in answer["data"]}

    def _settled(self, http: httpx.Client) -> dict[str, dict[str, Any]]:
        """The list once no delete is under way any more."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            seen = self._listed(http)
            if all(version["state"] == "ready" for adapter in seen.values() for version in adapter["versions"]):
                return seen
            if time.monotonic() > deadline:
                raise WrongError(f"deletes do not end: {json.dumps(seen)}")
            time.sleep(0.01)

    def _check_bytes(self, http: httpx.Client, seen: dict[str, dict[str, Any]]) -> None:
        for name, adapter in seen.items():
            for version in adapter["versions"]:
                path = f"/v1/adapters/{name}/versions/{version['version']}/files/"
                content = self.by_digest[version["digest"]]
                for file, expected in (("config", content.config), ("weights", content.weights)):
                    if http.get(path + file).raise_for_status().content != expected:
                        raise WrongError(f"{path}{file}: other bytes than were uploaded")

    def _check_rest(self, seen: dict[str, dict[str, Any]]) -> None:
        """Nothing lies in the store's folder but what the list names."""
        digests = {version["digest"] for adapter in seen.values() for version in adapter["versions"]}
        found = {
            "blobs": {path.name for path in (self.store / "blobs").iterdir()} - digests,
            "staging": {path.name for path in (self.store / "staging").iterdir()},
            "trash": {path.name for path in (self.store / "trash").iterdir()},
            "temporary files": {path.name for path in self.store.rglob("*.tmp")},
        }
        if any(found.values()) or len(list((self.store / "names").iterdir())) != len(seen):
            raise WrongError(f"left in the store: {found}")
        if problems := verify_folder(self.store):
            raise WrongError(f"verify: {problems}")

    def _check_answer(self, http: httpx.Client, name: str, active: int | None) -> None:
        """The bare name is answered by the active version."""
        answer = http.post("/v1/completions", json=self.plan.ask(name, self.random) | {"max_tokens": 1})
        found = answer.json()["model"] if answer.status_code == 200 else answer.status_code
        if found != (404 if active is None else f"{name}@{active}"):
            raise WrongError(f"{name}, active {active}, was answered by {found}: {answer.text}")

    def _check_audit(self) -> None:
        """Every acknowledged change is on record, in whole lines."""
        lines = self.store.with_name(f"{self.store.name}.audit.jsonl").read_bytes().splitlines()
        actions = Counter(json.loads(line)["action"] for line in lines)
        counted = self.report.acknowledged
        told = {
            "upload": counted["upload"],
            "delete": counted["delete"],
            "patch": counted["activate"] + counted["patch"],
        }
        if any(actions[action] < count for action, count in told.items()):
            raise WrongError(f"the audit log has {actions}, acknowledged were {told}")
