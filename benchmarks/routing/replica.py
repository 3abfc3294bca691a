"""Owns one simulated replica: seats, the tiers where adapters lie, the threads that move them. Times are seconds.

An adapter in use is not evicted; a request waits for its adapter, then for a seat, as in server/residency. Evicted is
what was used least recently.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from heapq import heapreplace

from benchmarks.routing.machine import Machine

FETCHES = 4
"""Fetches of a server at once (server/following)."""
DEVICE, HOST, DISK, STORE = range(4)
NOBODY = -1
Tier = OrderedDict[int, None]


@dataclass(frozen=True)
class Room:
    """How many adapters each tier of a replica holds."""

    device: int
    host: int
    disk: int


class Replica:
    """seats are taken by `running` requests. device, host, disk: adapters, least recently used first."""

    def __init__(self, rank: int, machine: Machine, room: Room) -> None:
        self.rank, self.machine, self.room = rank, machine, room
        self.running = 0
        self.device: Tier = OrderedDict()
        self.host: Tier = OrderedDict()
        self.disk: Tier = OrderedDict()
        self.users: dict[int, int] = {}
        self.loading: dict[int, list[int]] = {}
        """Adapters on their way to the device, each with the requests that wait for it."""
        self.for_room: deque[int] = deque()
        """Requests whose adapter finds no room, because all that is on the device is in use."""
        self.for_seat: deque[int] = deque()
        self.fetches = 0
        self._fetch_free = [0.0] * FETCHES
        self._read_free = self._place_free = 0.0

    @property
    def waiting(self) -> int:
        return len(self.for_seat)

    def fill(self, recent: list[int]) -> None:
        """Put adapters into every tier, the most recently used first."""
        for tier, most in (
            (self.device, self.room.device),
            (self.host, self.room.host),
            (self.disk, self.room.disk),
        ):
            tier.update(dict.fromkeys(reversed(recent[:most])))

    def victim(self) -> int | None:
        """The adapter that leaves the device for another; NOBODY if there is room, None if all are in use."""
        if len(self.device) < self.room.device:
            return NOBODY
        return next((adapter for adapter in self.device if not self.users.get(adapter)), None)

    def load(self, adapter: int, now: float) -> tuple[int, float]:
        """Begin to load an adapter that is not on the device: the tier where it was, and when it is on the device."""
        tier, there = HOST, now
        if adapter not in self.host:
            tier = DISK
            if adapter not in self.disk:
                tier = STORE
                there = max(now, self._fetch_free[0]) + self.machine.fetch_s
                heapreplace(self._fetch_free, there)
                self.fetches += 1
            _use(self.disk, adapter, self.room.disk)
            if tier == DISK:
                there = self._read_free = max(now, self._read_free) + self.machine.read_s
            else:  # by then the thread that reads is rarely busy
                there += self.machine.read_s
        _use(self.host, adapter, self.room.host)
        if tier == HOST:
            there = self._place_free = max(now, self._place_free) + self.machine.place_s
        else:
            there += self.machine.place_s
        return tier, there


def _use(tier: Tier, adapter: int, most: int) -> None:
    """Have an adapter in a tier, as the one used last."""
    if adapter in tier:
        tier.move_to_end(adapter)
    else:
        tier[adapter] = None
        if len(tier) > most:
            tier.popitem(last=False)
