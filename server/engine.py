"""Owns what the server asks of an engine: one small Protocol, so that routes are tested without one.

`server.vllm_engine.VllmEngine` is the real one.
"""

from dataclasses import dataclass
from typing import Protocol

from perft.base import BaseShape
from server.registry import ServedVersion


@dataclass(frozen=True)
class EngineStatus:
    """What the ranks agree on. moe_layers: how many MoE layers carry the operator on every rank (0: must not serve).

    rows_*: rows of the smallest rank's pool. problem: why moe_layers is 0.
    """

    moe_layers: int
    base: BaseShape | None
    rows_total: int
    rows_used: int
    problem: str | None = None


class Engine(Protocol):
    """The running engine."""

    async def status(self) -> EngineStatus:
        """Ask every rank. Raises if the engine is down."""
        ...

    async def load(self, version: ServedVersion) -> None:
        """Make a version resident on every rank. Raises if it cannot be."""
        ...
