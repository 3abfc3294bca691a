"""Owns the parts of a running server and how they are put together: one `Runtime` per process.

`start` builds them bottom up (engine, store, plan, catalog, metrics); the app finds them in its state. The real server
and the tests' server with the fake engine are put together here alike.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from adapters import Limits, Store, StoreError
from perft.memory import memory_bytes
from server.api.health import attach
from server.auth.keys import Caller
from server.auth.origin import OriginPolicy
from server.auth.rate_limits import RateLimits
from server.engine.protocol import Engine, EngineCounters, EngineStatus
from server.errors import StartError
from server.metrics.counters import EventCounters
from server.metrics.exposition import MetricsPage, forget_vllms_adapter_lists, serve_on
from server.metrics.snapshot import AdapterState, StateCollector, StateSnapshot
from server.middleware.access_control import AccessControl, AccessPolicy
from server.middleware.access_log import AccessLog
from server.middleware.adapter_routing import AdapterRouting, RoutingParts
from server.middleware.drain import DrainMiddleware, DrainState
from server.registry.audit import AuditLog
from server.registry.service import AdapterService
from server.registry.version import Version
from server.residency.scheduler import Capacity, ResidencyScheduler
from server.settings.sources import Settings
from server.uploads.receive import UploadLimits
from server.uploads.validate import LoRACheck, UploadValidator

ExpertTokens = Mapping[int, tuple[int, ...]]
COUNT_EVERY_S = 5.0
ASK_LIMIT_S = 1.0
"""How long a scrape waits for the workers, who answer between two steps."""


class Names:
    """What the catalog tells: served and gone versions (vLLM's table of names), uploads, changes to be recorded."""

    def __init__(self, metrics: EventCounters, audit: AuditLog, table: dict[str, Any], entry: Callable[[Version], Any]):
        self._metrics, self._audit, self._table, self._entry = metrics, audit, table, entry
        self.of: dict[int, str] = {}
        """Engine id of every version that is served -> its name."""

    def served(self, version: Version) -> None:
        self._table[version.id] = self._entry(version)
        self.of[version.engine.engine_id] = version.name

    def gone(self, version: Version) -> None:
        self._table.pop(version.id, None)
        self.of.pop(version.engine.engine_id, None)

    def name_gone(self, name: str) -> None:
        self._metrics.adapter_deleted(name)

    def uploaded(self, result: str) -> None:
        self._metrics.upload(result)

    def record(self, action: str, caller: Caller, **details: Any) -> None:
        self._audit.record(action, caller, caller.client, request_id=caller.request_id, **details)


class Runtime:
    """The parts, by name. Made by `start`."""

    def __init__(self, engine: Engine, settings: Settings, status: EngineStatus, base_names: list[str]) -> None:
        self.engine, self.settings, self.status = engine, settings, status
        self.base_names = base_names
        self.base_running: Callable[[], int] = lambda: 0
        self.counters = EngineCounters()
        self.registry = CollectorRegistry()
        self.metrics = EventCounters(
            self.registry, settings.metrics_max_adapters, base_name=base_names[0], is_known=self._is_known
        )
        self.registry.register(StateCollector(self.metrics, self.snapshot))
        self.page = MetricsPage(self.registry)
        self.limits = RateLimits(settings.key_max_requests, settings.key_tokens_per_minute)
        self.drain = DrainState()
        self._asking: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closers: list[Callable[[], None]] = []

    async def start(
        self,
        table: dict[str, Any],
        entry: Callable[[Version], Any],
        abort: Callable[[str], Awaitable[None]],
        max_running: int,
        check_lora: LoRACheck | None = None,
    ) -> None:
        """Open the store and bring its adapters in. table: where vLLM looks names up, filled with `entry(version)`.

        Raises StartError.
        """
        base = self.status.base
        assert base is not None
        audit = AuditLog(self.settings.audit_path)
        audit.open()
        try:
            store = await asyncio.get_running_loop().run_in_executor(None, Store.open, self.settings.adapter_store)
        except StoreError as error:
            raise StartError(f"--adapter-store: {error}") from error
        host_bytes = self.settings.host_cache_bytes
        capacity = Capacity(
            rows=self.status.rows_total,
            lora_slots=self.status.lora_slots,
            host_bytes=_a_tenth_of_memory() if host_bytes is None else host_bytes,
            running=max_running,
        )
        self.plan = ResidencyScheduler(self.engine, capacity, self.metrics)
        intake = UploadValidator(base, limits_of(self.settings), self.status.rows_total, check_lora)
        self.names = Names(self.metrics, audit, table, entry)
        self.catalog = AdapterService(store, self.plan, intake, self.base_names, self.settings, self.names, abort)
        await self.catalog.start()
        self.secret = store.secret
        self._tasks.append(asyncio.get_running_loop().create_task(self._count()))
        if self.settings.metrics_bind is not None:
            self._closers.append(serve_on(self.settings.metrics_bind, self.page))

    async def close(self) -> None:
        """Stop what runs in the background and let the store go. A server that ends its process needs none of it."""
        for task in self._tasks:
            task.cancel()
        for close in self._closers:
            close()
        await self.catalog.close()

    def fill(self, state: Any, is_local: bool) -> None:
        """Give an app's state what the routes and middlewares look for. The guard comes last: it opens the door."""
        settings = self.settings
        state.perft_engine, state.perft_catalog, state.perft_runtime = self.engine, self.catalog, self
        state.perft_drain, state.perft_page = self.drain, self.page
        state.perft_gate = RoutingParts(self.catalog, self.metrics, self.secret, settings.load_timeout_s)
        state.perft_upload_places = asyncio.Semaphore(settings.max_uploads)
        state.perft_upload_limits = UploadLimits(
            settings.max_adapter_bytes, settings.upload_timeout_s, settings.upload_idle_timeout_s
        )
        state.perft_guard = AccessPolicy(
            settings.key_ring,
            OriginPolicy(is_local),
            self.limits,
            AccessLog(settings.log_format),
            serves_metrics=settings.metrics_bind is None,
        )

    def _is_known(self, name: str) -> bool:
        return self.catalog.has(name)

    async def refresh(self) -> None:
        """Ask the workers for their counters; what was known stays if they do not answer soon."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        await asyncio.wait([self._asking], timeout=ASK_LIMIT_S)

    async def _ask(self) -> None:
        with suppress(Exception):
            self.status = await self.engine.status()
            before, self.counters = self.counters, await self.engine.counters()
            self._count_experts(before.expert_tokens, self.counters.expert_tokens)

    def _count_experts(self, before: ExpertTokens, now: ExpertTokens) -> None:
        """Count what the experts of every version that is still there did since the workers were last asked."""
        for engine_id, tokens in now.items():
            known = before.get(engine_id, ())
            if engine_id in self.names.of and tokens != known:
                grown = [count - then for count, then in zip_longest(tokens, known, fillvalue=0)]
                self.metrics.experts_worked(self.names.of[engine_id], grown)

    def snapshot(self) -> StateSnapshot:
        """What the server holds now, from memory. A scrape asks on a thread of its own."""
        adapters: dict[str, AdapterState] = {}
        for record, versions in self.catalog.look():
            served = {version.number: version for version in versions if version.accepted is not None}
            active = served.get(record.active or 0)
            adapters[record.name] = AdapterState(
                running=sum(len(version.running) for version in served.values()),
                waiting=sum(self.plan.waiting(version.engine) for version in served.values()),
                tier=self.plan.tier(active.engine) if active is not None else None,
            )
        disk = os.statvfs(self.settings.adapter_store)
        return StateSnapshot(
            adapters=adapters,
            max_lora=self.plan.capacity.running,
            base_running=self.base_running(),
            device_rows_used=self.plan.rows_used,
            device_rows_total=self.status.rows_total,
            store_bytes=self.catalog.store_bytes(),
            store_free_bytes=disk.f_bavail * disk.f_frsize,
            moe_layers=self.status.moe_layers,
            step_load_bytes=self.counters.step_load_bytes,
        )

    async def _count(self) -> None:
        while True:
            await self.refresh()
            forget_vllms_adapter_lists()
            await asyncio.sleep(COUNT_EVERY_S)


def dress(app: FastAPI) -> None:
    """Hang our routes and middlewares on an app; the last added is the outermost."""
    attach(app)
    for middleware in (AdapterRouting, DrainMiddleware, AccessControl):
        app.add_middleware(middleware)


def limits_of(settings: Settings) -> Limits:
    """The operator's limits of an adapter."""
    return Limits(settings.max_adapter_bytes, settings.allow_other_base)


def _a_tenth_of_memory() -> int:
    return memory_bytes() // 10
