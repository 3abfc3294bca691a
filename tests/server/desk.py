"""A real catalog over a real store and a real residency plan, on the fake engine: no sockets, one event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any

from adapters import Limits, Store
from adapters.ref import AdapterRef
from adapters.store.durable import Disk
from perft.base_model import BaseShape
from server.api.schemas import AdapterObject, AdapterPatch
from server.auth.keys import Caller
from server.errors import ApiError
from server.registry.service import AdapterService
from server.registry.version import Version
from server.residency.scheduler import Capacity, ResidencyScheduler
from server.uploads.validate import UploadValidator
from tests.server.fakes import BASE, FakeEngine
from tests.synthetic import RANDOM_R, write_adapter

ADMIN = Caller("admin", True)
ALICE, BOB = Caller("alice", False), Caller("bob", False)
ROWS = 2 * (4 + 2 * 4 * 16)
"""Rows that an adapter of RANDOM_R takes on the fakes' base."""
SMALL = RANDOM_R | {"bottleneck": 4}
PATIENCE_S = 20.0


@dataclass
class Quotas:
    """The settings that the catalog goes by."""

    max_adapters: int = 100
    max_versions: int = 20
    max_store_bytes: int | None = None
    drain_timeout_s: float = 30.0
    load_timeout_s: float = 10.0


@dataclass
class ServiceEvents:
    """Keeps what it is told. refuse_records: the audit log cannot be written. on_record: called with every entry."""

    table: set[str] = field(default_factory=set)
    names_gone: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refuse_records: bool = False
    on_record: Callable[[], None] = lambda: None

    def served(self, version: Version) -> None:
        self.table.add(version.id)

    def gone(self, version: Version) -> None:
        self.table.discard(version.id)

    def name_gone(self, name: str) -> None:
        self.names_gone.append(name)

    def uploaded(self, result: str) -> None:
        self.uploads.append(result)

    def record(self, action: str, caller: Caller, **details: Any) -> None:
        if self.refuse_records:
            raise ApiError(507, "storage_full", "the audit log cannot be written")
        self.on_record()
        self.records.append((action, details))


class Events:
    """Loads and evictions are nobody's business here."""

    def load_finished(self, tier: str, seconds: float, result: str) -> None:
        pass

    def evicted(self, tier: str) -> None:
        pass


class FullDisk(Disk):
    """A disk on which writing fails for as long as it is `full`."""

    full = False

    def step(self, operation: str, path: Path) -> None:
        if self.full and operation == "write":
            raise OSError(ENOSPC, "No space left on device")


@dataclass
class Desk:
    """An open catalog and what it stands on. aborted: request ids; on_abort: what the engine does about each."""

    catalog: AdapterService
    store: Store
    engine: FakeEngine
    watcher: ServiceEvents
    disk: FullDisk
    aborted: list[str] = field(default_factory=list)
    on_abort: Callable[[str], None] = lambda request_id: None
    is_closed: bool = False

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            await self.catalog.close()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.on_abort(request_id)

    async def upload(
        self, name: str, seed: int = 0, activate: bool = True, caller: Caller = ADMIN, values: dict[str, Any] = RANDOM_R
    ) -> tuple[AdapterObject, bool]:
        """As the route does it."""
        staged = self.catalog.stage()
        try:
            write_adapter(staged, BASE, seed, values)
            return await self.catalog.upload(name, staged, activate, caller)
        finally:
            self.catalog.discard(staged)

    async def patch(self, name: str, caller: Caller = ADMIN, **change: Any) -> AdapterObject:
        return await self.catalog.patch(name, AdapterPatch(**change), caller)

    def found(self, model: str, caller: Caller = ADMIN) -> Version:
        version = self.catalog.resolve(model, caller)
        assert version is not None
        return version

    @asynccontextmanager
    async def request(self, model: str, request_id: str = "request") -> AsyncIterator[Version]:
        """A request that runs on the engine for as long as the context lasts."""
        version = self.found(model)
        with self.catalog.lease(version):
            async with self.catalog.plan.lease(version.engine, PATIENCE_S), self.engine.request(version.engine):
                version.running.add(request_id)
                try:
                    yield version
                finally:
                    version.running.discard(request_id)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that happens by itself."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def until_gone(self, name: str) -> None:
        await self.until(lambda: not self.catalog.has(name))

    def is_on_device(self, model: str) -> bool:
        return self.catalog.plan.tier(self.engine_adapter(model)) == "device"

    def engine_adapter(self, model: str) -> AdapterRef:
        version = self.catalog.by_id(model)
        assert version is not None
        return version.engine


@asynccontextmanager
async def opened(
    folder: Path,
    engine: FakeEngine | None = None,
    quotas: Quotas | None = None,
    base: BaseShape = BASE,
    watcher: ServiceEvents | None = None,
    base_names: tuple[str, ...] = ("base", "org/alias"),
) -> AsyncIterator[Desk]:
    """The catalog of the store at `folder`, as one run of a server has it. A rule of the engine must not be broken."""
    engine = engine or FakeEngine()
    engine.restart()
    disk = FullDisk()
    store = Store.open(folder, disk)
    plan = ResidencyScheduler(engine, Capacity(engine.answer.rows_total, engine.answer.lora_slots, 2**40, 8), Events())
    intake = UploadValidator(base, Limits(), engine.answer.rows_total)
    watcher = watcher or ServiceEvents()
    holder: list[Desk] = []

    async def abort(request_id: str) -> None:
        await holder[0].abort(request_id)

    catalog = AdapterService(store, plan, intake, list(base_names), quotas or Quotas(), watcher, abort)
    holder.append(Desk(catalog, store, engine, watcher, disk))
    try:
        await catalog.start()
        yield holder[0]
        plan.check_integrity()
    finally:
        await holder[0].close()
    assert not engine.broken_rules


def on_a_loop(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    """A test that is a coroutine; it gets the folder of a store that is not there yet."""

    def run(tmp_path: Path) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await test(tmp_path / "store")

        asyncio.run(bounded())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
