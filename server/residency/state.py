"""Owns the state of residency: each content's versions, tiers and current move; the running requests.

Invariants: a content holds its room on the device (rows, or a LoRA slot) from the start of its move there until the
engine was asked to free it; what can be used there (`on_device`) holds its room. The sets of `Loaded` follow every
change of a content, so that no event has to look at all that are known.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from adapters.ref import AdapterRef

GRACE_S = 0.1
"""Seconds that a content stays on the device after its last request: the engine may still be aborting that one."""

Tier = Literal["device", "host", "disk"]
Pool = Literal["rows", "lora_slots"]
POOLS: tuple[Pool, ...] = ("rows", "lora_slots")
Move = Literal["reading", "placing", "evicting", "dropping", "freeing", "repairing"]
"""evicting: its room is promised to another content already. freeing: no version has the content any more."""


@dataclass(frozen=True)
class Capacity:
    """What there is: rows of the device pool, slots for PEFT LoRA, bytes for host copies, how many adapters can take
    part in one engine step (`running`), and how many sequences the engine takes at once (None: any number)."""

    rows: int
    lora_slots: int
    host_bytes: int
    running: int
    sequences: int | None = None

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
    """Why a move failed, and when (monotonic seconds). is_of_engine: the engine did not answer, so that the adapter can
    be tried again as soon as it does."""

    reason: str
    at: float
    is_of_engine: bool = False


class ResidentSet:
    """Residents in the order in which they entered, and the sum of their sizes."""

    def __init__(self, size: Callable[["Resident"], int]) -> None:
        self._size, self._members, self.total = size, dict[Resident, None](), 0

    def __iter__(self) -> Iterator["Resident"]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, resident: "Resident") -> bool:
        return resident in self._members

    def put(self, resident: "Resident", is_member: bool) -> None:
        """Make it a member, or none."""
        if is_member and resident not in self._members:
            self._members[resident] = None
            self.total += self._size(resident)
        elif not is_member and resident in self._members:
            del self._members[resident]
            self.total -= self._size(resident)

    def move_to_end(self, resident: "Resident") -> None:
        if resident in self._members:
            self._members[resident] = self._members.pop(resident)


class Loaded:
    """What is in memory, pinned or moving, as sets that follow every change. on_host: the least recently used first."""

    def __init__(self) -> None:
        self.holding = {pool: ResidentSet(_room) for pool in POOLS}
        self.pinned = {pool: ResidentSet(_room) for pool in POOLS}
        self.on_host = ResidentSet(lambda resident: resident.need.host_bytes)
        self.reading = ResidentSet(_one)
        self.unsettled = ResidentSet(_one)
        """Busy or lost: something will happen to it."""
        self._watches: list[set[str]] = []

    def follow(self, resident: "Resident") -> None:
        """Bring the sets up to date with one resident."""
        pool = resident.need.pool
        self.holding[pool].put(resident, resident.holds_room)
        self.pinned[pool].put(resident, bool(resident.pinned_by))
        self.on_host.put(resident, resident.on_host)
        self.reading.put(resident, resident.move == "reading")
        self.unsettled.put(resident, resident.is_busy or resident.is_lost)
        if resident.is_busy:
            self.moved(resident.key)

    def used(self, resident: "Resident") -> None:
        """It was used last."""
        self.on_host.move_to_end(resident)

    def moved(self, key: str) -> None:
        """A content moves, or is gone."""
        for watch in self._watches:
            watch.add(key)

    def on_device(self, pool: Pool) -> Iterator["Resident"]:
        """What holds room of a pool, or is pinned to get some."""
        yield from self.holding[pool]
        yield from (resident for resident in self.pinned[pool] if not resident.holds_room)

    def everywhere(self) -> set["Resident"]:
        """All that is held on the host or the device, or moves."""
        held = (*self.holding.values(), self.on_host, self.unsettled)
        return {resident for members in held for resident in members}

    def tiers(self) -> dict[str, "Tier"]:
        """Where every content is that is on the device or the host, by its key."""
        return {each.key: each.tier for each in self.everywhere() if each.on_device or each.on_host}

    def watch(self) -> set[str]:
        """A set that from now on gets the keys of all that moves, with those that do already; `unwatch` ends it."""
        moving = {resident.key for resident in self.unsettled if resident.is_busy}
        self._watches.append(moving)
        return moving

    def unwatch(self, watch: set[str]) -> None:
        self._watches = [other for other in self._watches if other is not watch]

    def check_integrity(self, residents: Iterable["Resident"]) -> None:
        """Raises AssertionError unless the sets are what a look at all residents gives."""
        known = list(residents)
        expected = Loaded()
        for resident in known:
            expected.follow(resident)
        for name in ("on_host", "reading", "unsettled"):
            _check_equal(getattr(self, name), getattr(expected, name), name)
        for pool in POOLS:
            _check_equal(self.holding[pool], expected.holding[pool], f"holding {pool}")
            _check_equal(self.pinned[pool], expected.pinned[pool], f"pinned to {pool}")
        uses = [resident.last_used for resident in self.on_host]
        assert uses == sorted(uses), "the host's copies are not in the order of use"


def _check_equal(found: ResidentSet, expected: ResidentSet, name: str) -> None:
    assert set(found) == set(expected) and found.total == expected.total, name


def _room(resident: "Resident") -> int:
    return resident.need.size


def _one(resident: "Resident") -> int:
    return 1


_FOLLOWED = frozenset({"on_host", "on_device", "is_lost", "holds_room", "move", "removals", "pinned_by"})


@dataclass(eq=False)
class Resident:
    """One content. Versions with the same content share it. loaded: the sets that follow its changes.

    owners: the versions, by engine id. running: leases by engine id. pinned_by: engine ids. removals: versions that are
    being removed. is_lost: the engine lost what it should hold on the device. last_used and idle_since: monotonic
    seconds.
    """

    need: Need
    key: str = ""
    owners: dict[int, AdapterRef] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    pinned_by: frozenset[int] = frozenset()
    on_host: bool = False
    on_device: bool = False
    is_lost: bool = False
    holds_room: bool = False
    move: Move | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    removals: int = 0
    last_used: float = float("-inf")
    idle_since: float = float("-inf")
    failed: Failure | None = None
    loaded: Loaded | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        loaded: Loaded | None = self.__dict__.get("loaded")  # the last field: until then nothing follows
        if loaded is None:
            return
        if name in _FOLLOWED:
            loaded.follow(self)
        if name in ("last_used", "on_host"):
            loaded.used(self)

    @property
    def tier(self) -> Tier:
        return "device" if self.on_device else "host" if self.on_host else "disk"

    @property
    def any_owner(self) -> AdapterRef:
        return next(iter(self.owners.values()))

    @property
    def is_busy(self) -> bool:
        """Whether the engine is moving it, or about to: no other move may start."""
        return self.move is not None or self.removals > 0

    @property
    def is_usable(self) -> bool:
        """Whether requests can run on it."""
        return self.on_device and not self.is_lost

    @property
    def is_evictable(self) -> bool:
        """Whether it can be evicted once no request uses it."""
        return self.is_usable and not self.pinned_by and not self.is_busy

    def start(self, move: Move) -> None:
        assert self.move is None, (self.move, move)
        self.move = move
        self.settled.clear()

    def settle(self) -> None:
        """The move has ended."""
        self.move = None
        self.settled.set()


class Leases:
    """The requests that run, by engine id, the id least recently admitted first. total: adapters that one step serves.

    clock: monotonic seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total, self._clock = total, clock
        self.running: dict[int, int] = {}

    def has_slot(self, engine_id: int) -> bool:
        """Whether a request of that id fits into the engine's step."""
        return engine_id in self.running or len(self.running) < self.total

    def admit(self, resident: Resident, engine_id: int) -> None:
        """Count a request in."""
        resident.running[engine_id] = resident.running.get(engine_id, 0) + 1
        self.running[engine_id] = self.running.pop(engine_id, 0) + 1  # now the last one admitted
        resident.last_used = self._clock()

    def release(self, resident: Resident, engine_id: int) -> bool:
        """Count a request out, unless its version was removed meanwhile. True if it was the id's last one."""
        if engine_id not in resident.running:
            return False
        if resident.running[engine_id] == 1:
            self.end(resident, engine_id)
            return True
        resident.running[engine_id] -= 1
        self.running[engine_id] -= 1
        return False

    def end(self, resident: Resident, engine_id: int) -> None:
        """Count all requests of an id out."""
        del resident.running[engine_id], self.running[engine_id]
        resident.last_used = resident.idle_since = self._clock()

    def check_integrity(self, residents: Iterable[Resident]) -> None:
        """Raises AssertionError unless what runs is what the residents say."""
        running = {number: count for resident in residents for number, count in resident.running.items()}
        assert running == self.running and len(running) <= self.total, (running, self.running)
