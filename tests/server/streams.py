"""Greedy answers that rounding cannot change, and streams that are read to their end.

Batches of other sizes take other kernels, so the CPU engine's float32 log-probabilities differ by rounding (1e-5 at
most, seen over 6,400 tokens) with what happens to run beside a request. Where every token leads the runner-up by
`CLEAR_LEAD`, that cannot change one: prompts are picked so, and then answers are compared exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

from tests import tiny
from tests.server.tiny_server import TinyClient

CLEAR_LEAD = 2e-4
PROMPT_LENGTH = 8
MOST_TRIES = 40


@dataclass(frozen=True)
class Case:
    """A prompt, and the answer that each of some models gives to it."""

    prompt: list[int]
    answers: dict[str, list[int]]


def clear_case(client: TinyClient, models: Sequence[str], tokens: int, seed: int, length: int = PROMPT_LENGTH) -> Case:
    """The first prompt of `seed` to which all of `models` answer with a clear lead at every token."""
    random = Random(seed)
    for _ in range(MOST_TRIES):
        prompt = [random.randrange(3, tiny.VOCABULARY) for _ in range(length)]
        found = {model: answer_and_lead(client, model, prompt, tokens) for model in models}
        if all(is_clear(lead) for _, lead in found.values()):
            return Case(prompt, {model: answer for model, (answer, _) in found.items()})
    raise AssertionError(f"no prompt of seed {seed} has a clear lead under {models}")


def is_clear(lead: float) -> bool:
    """Whether rounding cannot change a token that leads by so much."""
    return lead >= CLEAR_LEAD


def answer_and_lead(client: TinyClient, model: str, prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
    """The tokens of a completion, and the smallest log-probability by which one of them led the runner-up."""
    response = client.http.post("/v1/completions", json=client.body(model, prompt, tokens, logprobs=2))
    response.raise_for_status()
    (choice,) = response.json()["choices"]
    leads = [abs(first - second) for first, second in map(_two_best, choice["logprobs"]["top_logprobs"])]
    assert len(choice["token_ids"]) == len(leads) == tokens
    return choice["token_ids"], min(leads)


def _two_best(by_token: dict[str, float]) -> tuple[float, float]:
    first, second = sorted(by_token.values(), reverse=True)[:2]
    return first, second


@dataclass
class Watched:
    """All of one stream: its tokens, every `model` its events named, its finish reason, the error it ended with."""

    tokens: list[int] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    finish_reason: str | None = None
    error: dict[str, object] | None = None

    @property
    def model(self) -> str:
        (model,) = self.models
        return model


def watch(
    client: TinyClient, model: str, prompt: Sequence[int], tokens: int, begun: Event | None = None, **more: Any
) -> Watched:
    """Read a stream to its end. begun: set at its first event."""
    seen = Watched()
    for event in client.stream(model, prompt, tokens, **more):
        if begun is not None:
            begun.set()
        if "error" in event:
            seen.error = event["error"]
            continue
        seen.models.add(event["model"])
        for choice in event["choices"]:
            seen.tokens += choice["token_ids"] or ()
            seen.finish_reason = choice["finish_reason"] or seen.finish_reason
    return seen


def upload_version(client: TinyClient, name: str, folder: Path, activate: bool = True) -> str:
    """Upload a content that the name does not have; the new version's id."""
    response = client.upload(name, folder, activate)
    assert response.status_code == 201, response.text
    version: str = max(response.json()["versions"], key=lambda version: version["version"])["id"]
    return version
