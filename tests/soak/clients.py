"""Clients that change adapters without a pause until the server is gone, each with names nobody else changes."""

import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from tests.server.processes import LIMIT_S
from tests.soak.model import Change, NameModel, WrongError
from tests.store_contents import Content

TLS = ssl.create_default_context()
"""Made once: httpx would make one for every client, which is slow."""
MAX_VERSIONS = 4
PIECES = 20


def http_client(url: str, key: str) -> httpx.Client:
    """A client with a key that waits long. Its idle connections go long before the server closes them."""
    return httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=LIMIT_S, verify=TLS, trust_env=False,
        limits=httpx.Limits(keepalive_expiry=5),
    )  # fmt: skip


@dataclass
class Changer:
    """One client. `change` does one random change and keeps the models; `doubt` is the one that got no answer."""

    http: httpx.Client
    models: Sequence[NameModel]
    contents: Sequence[Content]
    random: Random
    may_pin: bool = True
    answered: dict[str, int] = field(default_factory=dict)
    doubt: tuple[str, NameModel, Change] | None = None
    cut_at: float | None = None

    def run(self) -> None:
        """Change until the connection breaks. Raises WrongError for a wrong answer."""
        while self.cut_at is None:
            self.change()

    def change(self) -> None:
        model = self.random.choice(self.models)
        kinds: list[Callable[[NameModel], None]] = [self._upload]
        if model.state.ready:
            kinds += [self._upload, self._delete_version, self._delete]
            kinds += 2 * [self._activate] + 3 * [self._patch]
        if len(model.state.ready) >= MAX_VERSIONS:
            kinds = [self._activate, self._delete_version, self._delete, self._patch]
        self.random.choice(kinds)(model)

    def _upload(self, model: NameModel) -> None:
        self.upload(model, self.random.choice(self.contents), self.random.random() < 0.7)

    def upload(self, model: NameModel, content: Content, activate: bool) -> None:
        """Some bodies come slowly, in pieces."""
        existing = content.digest in model.state.ready.values()
        change = model.state.uploaded(content.digest, activate)
        data = {"name": model.name, "activate": "true" if activate else "false"}
        files = {"config": content.config, "weights": content.weights}
        request = self.http.build_request("POST", "/v1/adapters", data=data, files=files)
        if self.random.random() < 0.2:
            request = self._slowed(request)
        note = f"{content.digest[:6]}{' active' * activate}"
        self._send("upload", note, model, change, request, 200 if existing else 201)

    def _slowed(self, request: httpx.Request) -> httpx.Request:
        """The same request whose body comes in pieces."""
        body, pause = request.read(), self.random.uniform(0, 0.005)
        size = -(-len(body) // PIECES)

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), size):
                time.sleep(pause)
                yield body[start : start + size]

        return self.http.build_request("POST", "/v1/adapters", headers=dict(request.headers), content=pieces())

    def _activate(self, model: NameModel) -> None:
        number = self.random.choice(sorted(model.state.ready))
        self._patch_with("activate", model, {"active": number, "if_active": model.state.active}, active=number)

    def _patch(self, model: NameModel) -> None:
        """Rights, the pin, and sometimes the active version with them: all of it at once."""
        keys = self.random.choice([None, ["alice"], ["alice", "bob"]])
        values: dict[str, Any] = {"allowed_keys": keys}
        if self.may_pin:
            values["pinned"] = self.random.random() < 0.5
        if self.random.random() < 0.5:
            values["active"] = self.random.choice(sorted(model.state.ready))
        self._patch_with("patch", model, values, **values | {"allowed_keys": None if keys is None else tuple(keys)})

    def _patch_with(self, kind: str, model: NameModel, body: dict[str, Any], **after: Any) -> None:
        if body.get("if_active", 0) is None:
            del body["if_active"]
        request = self.http.build_request("PATCH", f"/v1/adapters/{model.name}", json=body)
        self._send(kind, str(body), model, model.state.patched(**after), request, 200)

    def _delete_version(self, model: NameModel) -> None:
        state = model.state
        numbers = [number for number in state.ready if number != state.active or len(state.ready) == 1]
        number = self.random.choice(sorted(numbers))
        request = self.http.build_request("DELETE", f"/v1/adapters/{model.name}/versions/{number}")
        self._send("delete", str(number), model, state.deleted(number), request, 202)

    def _delete(self, model: NameModel) -> None:
        request = self.http.build_request("DELETE", f"/v1/adapters/{model.name}")
        self._send("delete", "all", model, model.state.deleted(None), request, 202)

    def _send(
        self, kind: str, what: str, model: NameModel, change: Change, request: httpx.Request, expected: int
    ) -> None:
        note = f"{kind} {what}"
        try:
            response = self.http.send(request)
        except httpx.TransportError as error:
            self.cut_at = time.monotonic()
            model.history.append(f"{note} -> {type(error).__name__}")
            model.possible = [*change.on_the_way, *change.after]
            self.doubt = (kind, model, change)
            return
        model.history.append(f"{note} -> {response.status_code}")
        if response.status_code != expected:
            raise WrongError(f"{note}: found {response.status_code} {response.text}, expected {expected}; {model}")
        model.agree(response.json(), change.after)
        self.answered[kind] = self.answered.get(kind, 0) + 1


def outcome(change: Change, place: int) -> str:
    """What became of a change without an answer. place: which of its possible states is the true one."""
    if place >= len(change.on_the_way):
        return "whole"
    return "nothing" if place == 0 else "a part that may stay"


@dataclass
class Asker:
    """Asks for completions of any name, so that deletes have somebody to wait for."""

    http: httpx.Client
    names: Sequence[str]
    random: Random
    body: Callable[[str, Random], dict[str, Any]]
    statuses: dict[int, int] = field(default_factory=dict)
    cut_at: float | None = None

    def run(self) -> None:
        while self.cut_at is None:
            name = self.random.choice(self.names)
            try:
                response = self.http.post("/v1/completions", json=self.body(name, self.random))
            except httpx.TransportError:
                self.cut_at = time.monotonic()
                return
            status = response.status_code
            if status not in (200, 404, 410):
                raise WrongError(f"a completion of {name}: {status} {response.text}")
            if status == 200 and not response.json()["model"].startswith(f"{name}@"):
                raise WrongError(f"a completion of {name} was answered by {response.json()['model']}")
            self.statuses[status] = self.statuses.get(status, 0) + 1
