"""Owns what is known of one content: whose it is, where it is, who uses it, and how it is on its way.

Invariant: a content holds its place on the device (rows, or a slot) from the start of its way there until the engine
was told to free it; what can be used there (`on_device`) holds its place.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapters.ref import AdapterRef
from server.api.schemas import Residency as Tier

GRACE_S = 0.1
"""How long a content keeps its place after its last request: the engine may still be told to abort that one."""

Pool = Literal["rows", "lora_slots"]
POOLS: tuple[Pool, ...] = ("rows", "lora_slots")
Move = Literal["reading", "placing", "leaving", "dropping", "freeing"]
"""leaving: the place is promised to another one already. freeing: nobody owns it any more."""


@dataclass(frozen=True)
class Capacity:
    """What there is: rows of the device pool, slots for PEFT LoRA, bytes for host copies, and how many adapters
    may take part in one engine step."""

    rows: int
    lora_slots: int
    host_bytes: int
    running: int

    def of(self, pool: Pool) -> int:
        return self.rows if pool == "rows" else self.lora_slots


@dataclass(frozen=True)
class Need:
    """What one adapter takes: rows on the device (PERFT) or a slot (PEFT LoRA), never both; bytes on the host."""

    rows: int
    lora_slots: int
    host_bytes: int

    def __post_init__(self) -> None:
        assert not (self.rows and self.lora_slots), self

    @property
    def pool(self) -> Pool:
        return "lora_slots" if self.lora_slots else "rows"

    @property
    def size(self) -> int:
        """Rows or slots, whichever it takes."""
        return self.lora_slots or self.rows


class Failure(NamedTuple):
    """Why a move failed, and when."""

    reason: str
    at: float


@dataclass(eq=False)
class Resident:
    """One content. Versions with the same content share it.

    owners: the versions, by engine id. running: leases by engine id. pinned_by: engine ids. removals: versions that
    are being removed. last_used and idle_since are times of the plan's clock.
    """

    need: Need
    owners: dict[int, AdapterRef] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    pinned_by: set[int] = field(default_factory=set)
    on_host: bool = False
    on_device: bool = False
    holds_place: bool = False
    move: Move | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    removals: int = 0
    last_used: float = float("-inf")
    idle_since: float = float("-inf")
    failed: Failure | None = None

    @property
    def tier(self) -> Tier:
        return "device" if self.on_device else "host" if self.on_host else "disk"

    @property
    def any_owner(self) -> AdapterRef:
        return next(iter(self.owners.values()))

    @property
    def is_busy(self) -> bool:
        """Whether the engine is at work on it, or about to be: no other move may start."""
        return self.move is not None or self.removals > 0

    @property
    def can_be_closed(self) -> bool:
        """Whether it leaves the device if nobody is let in any more."""
        return self.on_device and not self.pinned_by and not self.is_busy

    def start(self, move: Move) -> None:
        assert self.move is None, (self.move, move)
        self.move = move
        self.settled.clear()

    def settle(self) -> None:
        """The move has ended."""
        self.move = None
        self.settled.set()


@dataclass(eq=False)
class Waiter:
    """Who waits for an adapter: an activation (until it is on the host), a pin (on the device), or a request (a lease).

    ready: ends the wait. is_granted: the lease is counted.
    """

    resident: Resident
    adapter: AdapterRef
    wants: Literal["host", "device", "lease"]
    since: float
    ready: asyncio.Future[None]
    is_granted: bool = False
