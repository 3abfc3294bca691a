"""Owns what passes between the server and its compile process: frames of JSON, each after its length.

Invariant: a frame that was begun is whole or the connection is over.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

LENGTH_BYTES = 4

Outcome = Literal["passed", "refused", "too_slow", "too_large", "crashed", "stalled"]
"""too_slow: its CPU time is used up; too_large: its memory; stalled: it got no CPU time before the wall bound."""


@dataclass(frozen=True)
class Verdict:
    """What became of one compile. reason: for the caller, where the compiler gave one. cpu_s: what it took."""

    outcome: Outcome
    reason: str = ""
    cpu_s: float = 0.0


def frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def message_of(body: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(body)
    return message


def verdict_of(message: dict[str, Any]) -> Verdict:
    return Verdict(message["outcome"], message["reason"], message["cpu_s"])
