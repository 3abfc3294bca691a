"""Owns the interface to an engine: one small Protocol, so that routes can be tested without vLLM.

`server.engine.vllm.VllmEngine` implements it. Invariant: the engine only carries out its calls; which adapter is
where, and what is evicted, is decided in one place (`server.residency.scheduler`).
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adapters.ref import AdapterRef
from perft.base_model import BaseShape

LoadedTier = Literal["host", "device"]
"""A tier that the workers hold."""


@dataclass(frozen=True)
class EngineStatus:
    """What the ranks agree on. moe_layers: how many MoE layers carry the operator on every rank (0: must not serve).

    rows_*: rows of the smallest rank's pool. lora_slots: PEFT LoRA adapters that can be on the device at once (0: the
    operator left LoRA off). problem: why moe_layers is 0.
    """

    moe_layers: int
    base: BaseShape | None
    rows_total: int
    rows_used: int
    lora_slots: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class EngineCounters:
    """Counters that live in the workers. step_load_bytes: bytes read, hashed or packed inside an engine step.

    expert_tokens: engine id -> tokens (of the sampled steps) that each PEFT expert worked on.
    """

    step_load_bytes: int = 0
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RankInventory:
    """What one rank holds: keys (AdapterRef.key) by tier, and the rows of its pool that are in use.

    moving: keys that a thread of the rank is reading or copying right now.
    """

    host: frozenset[str]
    device: frozenset[str]
    rows_used: int
    moving: frozenset[str] = frozenset()

    def held(self, tier: LoadedTier) -> frozenset[str]:
        return self.host if tier == "host" else self.device


class AdapterLoadError(Exception):
    """A rank could not read, check or pack an adapter; the message says why. The engine goes on."""


ReadFiles = Callable[[AdapterRef, Callable[[AdapterRef], Awaitable[None]]], Awaitable[None]]
"""Has an adapter's files at hand while its second argument (Engine.prepare) reads them, and may call it twice. Raises
AdapterLoadError."""


class Engine(Protocol):
    """The running engine. Every call returns once all ranks have done it; no call holds up a step."""

    async def status(self) -> EngineStatus:
        """Ask every rank. Raises if the engine is down."""
        ...

    async def prepare(self, adapter: AdapterRef) -> None:
        """Disk to host: read, check and pack, beside the steps. Raises AdapterLoadError; then no rank has a copy."""
        ...

    async def place(self, adapter: AdapterRef, evict: Sequence[AdapterRef] = ()) -> None:
        """Free the rows of `evict`, then host to device rows, which must be free by then.

        Raises AdapterLoadError; then it has rows on no rank, and those of `evict` are free all the same.
        """
        ...

    async def evict(self, adapter: AdapterRef) -> None:
        """Free the device rows; the host keeps its copy. No running request may use them."""
        ...

    async def drop(self, adapter: AdapterRef) -> None:
        """Free the host's copy."""
        ...

    async def forget(self, adapter: AdapterRef) -> None:
        """The version is gone for good: keep nothing of its id."""
        ...

    async def counters(self) -> EngineCounters:
        """What the workers have counted since they started."""
        ...

    async def inventory(self) -> list[RankInventory]:
        """What every rank holds now. Raises if the engine is down."""
        ...

    async def discard(self, key: str, tier: LoadedTier) -> None:
        """Free whatever any rank holds under a key: content that should not be in that tier."""
        ...
