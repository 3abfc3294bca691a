"""A residency scheduler on the fake engine, and requests that record when they began and how they ended."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.ref import AdapterRef
from perft.config import AdapterConfig
from server.engine.protocol import LoadedTier
from server.errors import ServerError
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import GRACE_S, Capacity, Need
from tests.server.fakes import BASE, FakeEngine, ready_status, rows_of

UNIT = 16
"""Rows of an adapter of size 1."""
BYTES = 100
"""Host bytes of an adapter of size 1."""
MAX_SIZE = 10
FOREVER = 1e9


def write_sizes(folder: Path) -> None:
    """A folder for each size, 1 to MAX_SIZE; the fake engine reads only the configuration."""
    for size in range(1, MAX_SIZE + 1):
        config = AdapterConfig(
            base_model_name_or_path="x", variant="S", expert_type="parallel", bottleneck=4 * size, num_experts=1
        )
        (folder / str(size)).mkdir()
        (folder / str(size) / CONFIG_FILE).write_text(config.file_json())
        (folder / str(size) / WEIGHTS_FILE).touch()


class WatchedEngine(FakeEngine):
    """Also holds its caller to the grace after an adapter's last request, and to freeing before forgetting.

    released: key -> loop time. is_owned: whether a version has the content of a key.
    """

    def __init__(self, units: int, lora_slots: int) -> None:
        super().__init__(ready_status(units * UNIT, lora_slots))
        self.released: dict[str, float] = {}
        self.is_owned: Callable[[str], bool] = lambda key: False

    async def place(self, adapter: AdapterRef, evict: Sequence[AdapterRef] = ()) -> None:
        for leaving in evict:
            self._check_grace(leaving)
        await super().place(adapter, evict)

    async def evict(self, adapter: AdapterRef) -> None:
        self._check_grace(adapter)
        await super().evict(adapter)

    async def drop(self, adapter: AdapterRef) -> None:
        try:
            await super().drop(adapter)
        finally:
            self.on_host.discard(adapter.key)  # an engine that fails at this is down, and holds nothing

    async def forget(self, adapter: AdapterRef) -> None:
        resident = adapter.key in self.on_device or adapter.key in self.on_host
        self._rule(self.is_owned(adapter.key) or not resident, f"forget of {adapter.name}, which is still resident")
        try:
            await super().forget(adapter)
        finally:
            self._forgotten.add(adapter.engine_id)

    def _check_grace(self, adapter: AdapterRef) -> None:
        since = asyncio.get_running_loop().time() - self.released.get(adapter.key, 0.0)
        self._rule(since >= GRACE_S - 1e-9, f"{adapter.name} leaves {since} s after its last request")


@dataclass
class CountedEvents:
    """The events, counted."""

    loads: Counter[tuple[LoadedTier, str]] = field(default_factory=Counter)
    evictions: Counter[LoadedTier] = field(default_factory=Counter)
    repairs: Counter[LoadedTier] = field(default_factory=Counter)

    def load_finished(self, tier: LoadedTier, seconds: float, result: Literal["ok", "failed"]) -> None:
        assert seconds >= 0
        self.loads[tier, result] += 1

    def evicted(self, tier: LoadedTier) -> None:
        self.evictions[tier] += 1

    def repaired(self, tier: LoadedTier) -> None:
        self.repairs[tier] += 1


@dataclass(eq=False)
class Request:
    """One request. adapter: None for the base. label: of its key. asked, began and ended: loop times.

    error: why it was rejected. is_admitted: it held a lease.
    """

    adapter: AdapterRef | None
    seconds: float
    asked: float
    began: float = -1.0
    ended: float = -1.0
    error: ServerError | None = None
    is_admitted: bool = False
    task: asyncio.Task[None] | None = None
    label: str | None = None

    @property
    def waited(self) -> float:
        assert self.is_admitted, (self.adapter, self.error)
        return self.began - self.asked


class World:
    """Make it inside a running loop. `units` of rows: an adapter takes as many as its size. delays: of the engine."""

    def __init__(
        self,
        folder: Path,
        units: int = 3,
        lora_slots: int = 0,
        host: int = 1000,
        running: int = 100,
        sequences: int | None = None,
        **delays: float,
    ) -> None:
        self.loop, self.folder = asyncio.get_running_loop(), folder
        self.engine, self.events = WatchedEngine(units, lora_slots), CountedEvents()
        self.engine.delays.update(delays)
        self.engine.is_owned = lambda key: any(self.knows(adapter) for adapter in self.known if adapter.key == key)
        capacity = Capacity(units * UNIT, lora_slots, host * BYTES, running, sequences)
        self.scheduler = ResidencyScheduler(self.engine, capacity, self.events, clock=self.loop.time)
        self.known: list[AdapterRef] = []
        self.requests: list[Request] = []
        self._askers: list[asyncio.Task[None]] = []
        self.rounds, self.at_round = 0, dict[int, Callable[[], object]]()

    def check(self) -> None:
        """Call it after every round of the loop. Raises AssertionError unless every invariant holds."""
        self.rounds += 1
        self.at_round.pop(self.rounds, lambda: None)()
        assert not self.engine.broken_rules, self.engine.broken_rules
        self.scheduler.check_integrity()

    def add(self, name: str, size: int = 1, content: str = "", kind: Literal["PERFT", "LORA"] = "PERFT") -> AdapterRef:
        """A new version; those of equal content share it. LoRA adapters have no size but 0."""
        number = len(self.known) + 1
        digest = f"{content or number}-{size}"
        adapter = AdapterRef(f"{name}@{number}", number, kind, digest, self.folder / str(size))
        self.known.append(adapter)
        need = Need(0, 1, BYTES) if kind == "LORA" else Need(rows_of(adapter), 0, size * BYTES)
        assert need.rows == (0 if kind == "LORA" else size * UNIT), (need, BASE)
        self.scheduler.add(adapter, need)
        return adapter

    def ask(
        self, adapter: AdapterRef | None, seconds: float = 1.0, timeout_s: float = FOREVER, label: str | None = None
    ) -> Request:
        """A request that runs for `seconds` once it is admitted."""
        request = Request(adapter, seconds, self.loop.time(), label=label)
        request.task = self.loop.create_task(self._run(request, timeout_s))
        self.requests.append(request)
        return request

    async def _run(self, request: Request, timeout_s: float) -> None:
        adapter, scheduler = request.adapter, self.scheduler
        lease = (
            scheduler.base_lease(request.label)
            if adapter is None
            else scheduler.lease(adapter, timeout_s, label=request.label)
        )
        try:
            async with lease:
                request.began, request.is_admitted = self.loop.time(), True
                try:
                    async with self.engine.request(adapter):
                        await asyncio.sleep(request.seconds)
                finally:
                    if adapter is not None:
                        self.engine.released[adapter.key] = self.loop.time()
        except ServerError as error:
            request.error = error
        finally:
            request.ended = self.loop.time()

    async def use(self, *adapters: AdapterRef, seconds: float = 0.01) -> None:
        """One request after the other, to its end; then idle long enough to be evicted."""
        for adapter in adapters:
            request = self.ask(adapter, seconds)
            await self.end(request)
            assert request.error is None, request.error
        await asyncio.sleep(2 * GRACE_S)

    async def end(self, *requests: Request) -> None:
        """Wait until they have ended; fail if that takes long."""
        for request in requests:
            assert request.task is not None
            done, _ = await asyncio.wait([request.task], timeout=100)
            assert done, f"a request on {request.adapter} waits for ever"

    def cancel(self, request: Request) -> None:
        """The client goes away."""
        assert request.task is not None
        request.task.cancel()

    def keep_asking(self, adapter: AdapterRef, seconds: float = 1.0, every: float = 0.5) -> asyncio.Task[None]:
        """Requests that overlap, so that the adapter is never idle. Cancel the task to stop."""

        async def ask() -> None:
            while True:
                self.ask(adapter, seconds)
                await asyncio.sleep(every)

        self._askers.append(self.loop.create_task(ask()))
        return self._askers[-1]

    def knows(self, adapter: AdapterRef) -> bool:
        """Whether it was not removed."""
        resident = self.scheduler._residents.get(adapter.key)
        return resident is not None and adapter.engine_id in resident.owners

    async def leave_nothing(self) -> None:
        """End all requests, remove all versions: no waiter, room or copy stays, and each version is forgotten once."""
        for task in (*self._askers, *(request.task for request in self.requests if request.task is not None)):
            task.cancel()
        await asyncio.sleep(100)
        assert all(request.task is not None and request.task.done() for request in self.requests)
        for adapter in self.known:
            if self.knows(adapter):
                await self.scheduler.remove(adapter)
        scheduler, engine = self.scheduler, self.engine
        assert not scheduler._residents and not scheduler._waiters and not scheduler.transfers._tasks
        assert not scheduler._sequences.used and not scheduler._sequences.base
        assert not scheduler.loaded.everywhere()
        assert not engine.on_device and not engine.on_host
        assert engine.count("forget") == len(engine._forgotten) == len(self.known)

    def tiers(self, *adapters: AdapterRef) -> str:
        """The first letters of where they are: device, host, disk becomes "dhx"."""
        return "".join({"device": "d", "host": "h", "disk": "x"}[self.scheduler.tier(adapter)] for adapter in adapters)

    def calls(self, *operations: str) -> list[tuple[str, str]]:
        """The engine's calls of these operations."""
        return [call for call in self.engine.calls if call[0] in operations]
