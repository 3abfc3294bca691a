"""A real adapter service over a real store and a real scheduler, on the fake engine: no sockets, one event loop.

Time is virtual: a delay of the engine or a timeout ends when every task waits, never because the machine is busy.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any

from adapters.format.files import Limits
from adapters.ref import AdapterRef
from adapters.store import UNCHANGED, FolderStore, Keys, Store
from adapters.store.folder.durable import Disk
from adapters.store.log.store import LogStore
from perft.base_model import BaseShape
from perft.operator.tables import pool_rows
from server.auth.keys import Caller
from server.errors import AuditLogError
from server.following.follower import Follower
from server.following.following import Following
from server.following.opening import reading
from server.registry.listing.page import ListPage, ListQuery, list_adapters
from server.registry.registry import Registry
from server.registry.service import AdapterService
from server.registry.version import AdapterView, Version
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import Capacity
from server.uploads.validate import LoRACheck, UploadValidator
from tests.server.fakes import BASE, FakeEngine
from tests.server.virtual_time import run_virtually
from tests.synthetic import RANDOM_R, write_adapter

ADMIN = Caller("admin", True)
ALICE, BOB = Caller("alice", False), Caller("bob", False)
ROWS = pool_rows(2 * (4 + 2 * 4 * 16))
"""Rows that an adapter of RANDOM_R takes on the fakes' base."""
SMALL = RANDOM_R | {"bottleneck": 4}
PATIENCE_S = 20.0
LAG_S, GRACE_S = 2.0, 60.0


@dataclass
class Quotas:
    """The settings that limit the service."""

    max_adapters: int = 100
    max_versions: int = 20
    max_store_bytes: int | None = None
    drain_timeout_s: float = 30.0
    load_timeout_s: float = 10.0


@dataclass
class Followed:
    """Keeps the events of the service (ServiceEvents)."""

    table: set[str] = field(default_factory=set)
    names_removed: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    def version_added(self, version: Version) -> None:
        self.table.add(version.id)

    def version_removed(self, version: Version) -> None:
        self.table.discard(version.id)

    def name_removed(self, name: str) -> None:
        self.names_removed.append(name)

    def upload_finished(self, result: str) -> None:
        self.uploads.append(result)


@dataclass
class Audit:
    """Keeps what is recorded. is_broken: nothing can be written. on_record: called before every entry."""

    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    is_broken: bool = False
    on_record: Callable[[], None] = lambda: None

    def record(self, action: str, caller: Caller, **details: Any) -> None:
        if self.is_broken:
            raise AuditLogError("the audit log cannot be written")
        self.on_record()
        self.records.append((action, details))


class Events:
    """Ignores loads, evictions and repairs."""

    def load_finished(self, tier: str, seconds: float, result: str) -> None:
        pass

    def evicted(self, tier: str) -> None:
        pass

    def repaired(self, tier: str) -> None:
        pass


class FullDisk(Disk):
    """A disk on which writing fails for as long as it is `full`."""

    full = False

    def step(self, operation: str, path: Path) -> None:
        if self.full and operation == "write":
            raise OSError(ENOSPC, "No space left on device")


@dataclass
class Desk:
    """An open service and its parts. aborted: request ids; on_abort: what the engine does about each."""

    service: AdapterService
    registry: Registry
    scheduler: ResidencyScheduler
    store: Store
    engine: FakeEngine
    followed: Followed
    audit: Audit
    disk: FullDisk
    aborted: list[str] = field(default_factory=list)
    on_abort: Callable[[str], None] = lambda request_id: None
    is_closed: bool = False

    @property
    def following(self) -> Following:
        return self.service.following

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            await self.service.close()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.on_abort(request_id)

    def adapters(self, caller: Caller) -> list[AdapterView]:
        """All that the caller sees."""
        work = list_adapters(self.registry, caller, ListQuery())
        while True:
            try:
                next(work)
            except StopIteration as done:
                page: ListPage = done.value
                return page.data

    async def upload(
        self,
        name: str,
        seed: int = 0,
        activate: bool = True,
        caller: Caller = ADMIN,
        values: dict[str, Any] = RANDOM_R,
        allowed_keys: Keys = UNCHANGED,
    ) -> tuple[AdapterView, bool]:
        """Upload as the route does."""
        staged = self.service.stage()
        try:
            write_adapter(staged, BASE, seed, values)
            return await self.service.upload(name, staged, activate, caller, allowed_keys=allowed_keys)
        finally:
            self.service.discard(staged)

    async def patch(self, name: str, caller: Caller = ADMIN, **change: Any) -> AdapterView:
        return await self.service.patch(name, change, caller)

    def found(self, model: str, caller: Caller = ADMIN) -> Version:
        version = self.registry.resolve(model, caller)
        assert version is not None
        return version

    @asynccontextmanager
    async def request(self, model: str, request_id: str = "request") -> AsyncIterator[Version]:
        """A request that runs on the engine for as long as the context lasts."""
        version = self.found(model)
        with self.registry.lease(version):
            async with self.scheduler.lease(version.ref, PATIENCE_S), self.engine.request(version.ref):
                version.running.add(request_id)
                version.requests_running += 1
                try:
                    yield version
                finally:
                    version.running.discard(request_id)
                    version.requests_running -= 1

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that happens by itself."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def until_gone(self, name: str) -> None:
        await self.until(lambda: not self.registry.has(name))

    def is_on_device(self, model: str) -> bool:
        return self.scheduler.tier(self.ref(model)) == "device"

    def ref(self, model: str) -> AdapterRef:
        version = self.registry.by_id(model)
        assert version is not None
        return version.ref


@asynccontextmanager
async def opened(
    folder: Path,
    engine: FakeEngine | None = None,
    quotas: Quotas | None = None,
    base: BaseShape = BASE,
    audit: Audit | None = None,
    base_names: tuple[str, ...] = ("base", "org/alias"),
    allow_other_base: bool = False,
    check_lora: LoRACheck | None = None,
    disk_is_full: bool = False,
    shared: LogStore | None = None,
) -> AsyncIterator[Desk]:
    """The service over the store at `folder`, or a shared one, as one run of a server has it. Fails if an engine rule
    was broken."""
    engine = engine or FakeEngine()
    engine.restart()
    disk = FullDisk()
    store: Store = FolderStore.open(folder, disk) if shared is None else shared
    disk.full = disk_is_full
    scheduler = ResidencyScheduler(
        engine,
        Capacity(engine.answer.rows_total, engine.answer.lora_slots, 2**40, 8),
        Events(),
        clock=asyncio.get_running_loop().time,
        read_files=reading(store),
    )
    validator = UploadValidator(base, Limits(allow_other_base=allow_other_base), engine.answer.rows_total, check_lora)
    followed, audit = Followed(), audit or Audit()
    holder: list[Desk] = []

    async def abort(request_id: str) -> None:
        await holder[0].abort(request_id)

    registry = Registry(store, scheduler, list(base_names))
    service = AdapterService(registry, store, scheduler, validator, quotas or Quotas(), audit, followed, abort)
    holder.append(Desk(service, registry, scheduler, store, engine, followed, audit, disk))
    follower = None if shared is None else make_follower(shared, service, quotas or Quotas())
    try:
        await service.start()
        if follower is not None:
            await follower.start()
        yield holder[0]
        scheduler.check_integrity()
    finally:
        if follower is not None:
            await follower.close()
        await holder[0].close()
    assert not engine.broken_rules


def make_follower(store: LogStore, service: AdapterService, quotas: Quotas) -> Follower:
    """As server/following/opening does, by the clock of the loop."""
    loop = asyncio.get_running_loop()
    follower = Follower(
        store, service.take_over, lambda work: loop.run_in_executor(None, work), loop.time,
        LAG_S, GRACE_S, quotas.drain_timeout_s,
    )  # fmt: skip
    service.following = follower
    return follower


def on_a_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Make a test of a coroutine, in virtual time; it gets the folder of a store that does not exist yet."""

    def run(tmp_path: Path) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(3600):
                await test(tmp_path / "store")

        run_virtually(bounded())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
