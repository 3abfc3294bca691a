"""A fake engine: fast route and start tests rest on it, no claim about answers does."""

from dataclasses import dataclass, field

import torch

from perft.base import BaseShape
from server.engine import EngineStatus
from server.registry import ServedVersion

BASE = BaseShape(
    hidden_size=8, num_layers=2, moe_layers=(0, 1), num_experts=4, top_k=2, dtype=torch.float32, fingerprint="0" * 64
)


@dataclass
class FakeEngine:
    """Says what it is told to say, and keeps what it was asked to load."""

    answer: EngineStatus = field(default_factory=lambda: EngineStatus(2, BASE, 1000, 0))
    loaded: list[ServedVersion] = field(default_factory=list)
    down: bool = False

    async def status(self) -> EngineStatus:
        if self.down:
            raise RuntimeError("engine dead")
        return self.answer

    async def load(self, version: ServedVersion) -> None:
        self.loaded.append(version)
