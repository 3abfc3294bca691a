"""A fleet of servers over one store, in virtual time, with a network that delays, loses and cuts; and what it promises.

The store, its log and the follower are the product's own; a server is reduced to what it lets in. A promise is broken
if a request that came after an answer is let in with what was there before it.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count as count_up
from pathlib import Path
from typing import TypeVar

from adapters.errors import StoreError
from adapters.store.log.bucket import Bucket
from adapters.store.log.objects import Objects
from adapters.store.log.store import LogStore
from server.errors import StoreUnreachableError
from server.following.follower import Follower
from tests.store.faults import Faulty
from tests.store_contents import perft, upload

LAG_S, GRACE_S = 2.0, 60.0
NAMES = tuple(f"adapter-{number}" for number in range(4))
T = TypeVar("T")


class Network:
    """Between one server and the store. Seeded: the same faults in every run. objects: the store, as seen from here."""

    def __init__(self, place: Objects, chance: random.Random) -> None:
        self.chance, self.is_cut, self.objects = chance, False, Faulty(place)
        self.objects.before = lambda operation, key: self._lose("nothing was sent")
        self.objects.after = lambda operation, key: self._lose("the answer was lost")

    async def across(self, work: Callable[[], T]) -> T:
        """Do `work` at the store. It is done when it arrives there; its answer comes later."""
        await asyncio.sleep(self._delay())
        found = await asyncio.get_running_loop().run_in_executor(None, work)
        await asyncio.sleep(self._delay())
        return found

    def _delay(self) -> float:
        return self.chance.choice((0.001, 0.01, 0.01, 0.05, 0.2, 1.5))

    def _lose(self, what: str) -> None:
        if self.is_cut or self.chance.random() < 0.005:
            raise OSError(what)


@dataclass
class Promises:
    """What was answered, by name: (time of the answer, position in the log). broken: what was let in against it."""

    answered: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    admissions: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)

    def check(self, name: str, came: float, position: int) -> None:
        """A request that came at a moment was let in by a server that knew the name as of a position."""
        self.admissions += 1
        must_know = max((at for when, at in self.answered[name][-8:] if when <= came), default=0)
        if position < must_know:
            self.broken.append(f"{name} at {came:.3f}: served as of entry {position}, answered entry {must_know}")


class Server:
    """What one server knows, and what it lets in. clock: its own, which starts anywhere and runs a little wrong."""

    def __init__(self, place: Bucket, cache: Path, chance: random.Random, promises: Promises) -> None:
        loop, offset, rate = asyncio.get_running_loop(), chance.uniform(-3600, 3600), 1 + chance.uniform(-1e-4, 1e-4)
        self.clock: Callable[[], float] = lambda: offset + rate * loop.time()
        self.network, self.promises = Network(place, chance), promises
        self.store = _opened(self.network.objects, cache, self.clock)
        self.known: dict[str, int] = {}
        """By name: the position in the log as of which it is served."""
        self.follower = self.make_follower()

    def make_follower(self) -> Follower:
        return Follower(self.store, self.take_over, self.network.across, self.clock, LAG_S, GRACE_S, 0.0)

    async def take_over(self, name: str) -> None:
        await asyncio.sleep(0)
        self.known[name] = self.store.position

    async def change(self, name: str, keys: str) -> None:
        """Restrict as a client sees it: an answer after which all must keep to it, or an error. keys: never given
        before, so that there is a change."""

        def commit() -> int:
            self.store.update(name, allowed_keys=(keys,))
            return self.store.position

        try:
            position = await self.network.across(commit)
        except StoreError:
            return
        self.known[name] = max(position, self.known.get(name, 0))
        await self.follower.committed()
        self.promises.answered[name].append((asyncio.get_running_loop().time(), position))

    async def admit(self, name: str, times: int) -> None:
        """Requests that come now, one after another."""
        for _ in range(times):
            came = asyncio.get_running_loop().time()
            try:
                await self.follower.admit(name)
            except StoreUnreachableError:
                self.promises.refused += 1
                return
            self.promises.check(name, came, self.known.get(name, 0))


ServerClass = Callable[[Bucket, Path, random.Random, Promises], Server]


async def run_fleet(
    folder: Path, seed: int, make: ServerClass = Server, count: int = 3, seconds: float = 120.0, burst: int = 40
) -> Promises:
    """A fleet for some virtual time: restrictions on any server, requests on all, partitions that come and go."""
    chance, place, promises = random.Random(seed), Bucket("memory:///"), Promises()
    first = LogStore.open(place, folder / "first")
    for name in NAMES:
        upload(first, name, perft(1))
    first.close()
    servers = [make(place, folder / str(n), random.Random(seed * 100 + n), promises) for n in range(count)]
    tasks: list[Awaitable[None]] = []
    loop, numbers = asyncio.get_running_loop(), count_up()
    end = loop.time() + seconds
    for server in servers:
        await _started(server)

    async def changing() -> None:
        while loop.time() < end:
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            await chance.choice(servers).change(chance.choice(NAMES), str(next(numbers)))

    async def asking(server: Server) -> None:
        while loop.time() < end:
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            await server.admit(chance.choice(NAMES), burst)

    async def cutting() -> None:
        while loop.time() < end:
            await asyncio.sleep(chance.uniform(1.0, 6.0))
            server = chance.choice(servers)
            server.network.is_cut = True
            await asyncio.sleep(chance.uniform(0.5, 9.0))
            server.network.is_cut = False

    tasks = [changing(), changing(), changing(), cutting(), *(asking(server) for server in servers for _ in range(3))]
    await asyncio.gather(*tasks)
    for server in servers:
        await server.follower.close()
        server.store.close()
    return promises


def _opened(objects: Objects, cache: Path, clock: Callable[[], float]) -> LogStore:
    while True:
        try:
            return LogStore.open(objects, cache, clock=clock, pause=lambda seconds: None)
        except StoreError:
            continue


async def _started(server: Server) -> None:
    while True:
        try:
            await server.follower.start()
        except StoreError:
            continue
        return


class Hasty(Server):
    """Answers a change at once."""

    def make_follower(self) -> Follower:
        follower = super().make_follower()

        async def at_once() -> None:
            return

        follower.committed = at_once  # type: ignore[method-assign]
        return follower


class Careless(Server):
    """Lets everything in, however long ago it looked."""

    def make_follower(self) -> Follower:
        follower = super().make_follower()

        async def at_once(name: str | None = None) -> None:
            return

        follower.admit = at_once  # type: ignore[method-assign]
        return follower


class Optimist(Server):
    """Counts a look from when its answer came."""

    def make_follower(self) -> Follower:
        follower = super().make_follower()
        look_once = follower._look_once

        async def late() -> None:
            await look_once()
            follower.seen = self.clock()

        follower._look_once = late  # type: ignore[method-assign]
        return follower


class Forgetful(Server):
    """Does not wait for what a look found to be taken over."""

    def make_follower(self) -> Follower:
        follower = super().make_follower()

        async def at_once(name: str | None) -> None:
            return

        follower._until_taken_over = at_once  # type: ignore[method-assign]
        return follower

    async def take_over(self, name: str) -> None:
        position = self.store.position
        await asyncio.sleep(3.0)
        self.known[name] = position


class Overhasty(Server):
    """Takes a change for known that came while an earlier one of its name was taken over."""

    def make_follower(self) -> Follower:
        follower = super().make_follower()
        take_over = follower._take_over

        async def and_all_since(name: str) -> None:
            await take_over(name)
            follower._news.discard(name)

        follower._take_over = and_all_since
        return follower

    async def take_over(self, name: str) -> None:
        position = self.store.position
        await asyncio.sleep(3.0)
        self.known[name] = max(position, self.known.get(name, 0))
