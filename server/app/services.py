"""Owns how the parts of a running server are put together, bottom up: engine, store, scheduler, registry, metrics.

The real server and the tests' server with a fake engine are put together here alike.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from adapters.store import AdapterRecord, Store
from perft.memory import memory_bytes
from server.api.dependencies import Services
from server.app.connections import serve_metrics
from server.app.monitor import EngineMonitor
from server.auth.origin import OriginPolicy
from server.auth.rate_limits import RateLimits
from server.bodies.check import RequestBodies
from server.bodies.limits import BodyLimits
from server.bodies.models import RequestModel
from server.console.metrics import SharedMetrics
from server.engine.health import EngineHealth, WatchedEngine
from server.engine.protocol import Engine, EngineStatus
from server.following.following import Following
from server.following.opening import make_follower, open_store_of, reading, start_following
from server.metrics.choice import render_choice
from server.metrics.counters import EventCounters
from server.metrics.exposition import MetricsPage, render
from server.metrics.snapshot import AdapterState, StateCollector, StateSnapshot, device_capacity
from server.middleware.access_log import AccessLog
from server.registry.audit import AuditLog
from server.registry.registry import Registry
from server.registry.service import AdapterService, upload_result
from server.registry.version import Version
from server.residency.reconciliation import Reconciler
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import Capacity, Need
from server.settings.model import Settings
from server.sources.fetching import FetchLimits
from server.sources.loading import AdapterSources
from server.structured_outputs.checker import SpecChecker
from server.uploads.receive import UploadLimits
from server.uploads.validate import LoRACheck, UploadValidator


@dataclass(frozen=True)
class EngineSide:
    """What the parts need of the engine's side. health: watches the engine; started and stopped by its maker.

    names: vLLM's table of versions, by NAME@version; filled with `name_entry(version)`. abort: ends an engine
    request by its id. max_running: adapters that one step can serve. max_sequences: that the engine
    takes at once. check_lora: None where PEFT LoRA is off.
    base_running: how many requests without an adapter run. is_local: only this machine can connect. allowed_origins:
    whose pages may use inference (vLLM's --allowed-origins).
    max_model_len: tokens. specs: checks structured outputs; closed with the services. request_models: path -> what is
    known of the request model there. takes_tools: calls of tools can be read from an answer.
    """

    engine: Engine
    health: EngineHealth
    status: EngineStatus
    base_names: list[str]
    max_model_len: int
    names: dict[str, Any]
    name_entry: Callable[[Version], Any]
    abort: Callable[[str], Awaitable[None]]
    max_running: int
    is_local: bool
    allowed_origins: frozenset[str] = frozenset()
    check_lora: LoRACheck | None = None
    specs: SpecChecker | None = None
    base_running: Callable[[], int] = lambda: 0
    max_sequences: int | None = None
    request_models: Mapping[str, RequestModel] = field(default_factory=dict)
    takes_tools: bool = True


async def build_services(side: EngineSide, settings: Settings) -> Services:
    """Open the store and load its adapters' records. Raises StartError."""
    assert side.status.base is not None
    audit = AuditLog(settings.audit_path)
    audit.open()
    store = await open_store_of(settings)
    served = _ServedVersions(side)
    prometheus = CollectorRegistry()
    metrics = EventCounters(
        prometheus, settings.metrics_max_adapters, base_name=side.base_names[0], is_known=served.is_known
    )
    served.metrics = metrics
    engine, asked_anyway = (WatchedEngine(side.engine, side.health, is_patient=patient) for patient in (False, True))
    scheduler = ResidencyScheduler(
        engine, _capacity(side, settings), metrics, engine_problem=side.health.doubt, read_files=reading(store)
    )
    registry = served.registry = Registry(store, scheduler, side.base_names)
    validator = UploadValidator(side.status.base, settings.adapter_limits, side.status.rows_total, side.check_lora)
    adapters = AdapterService(registry, store, scheduler, validator, settings, audit, served, side.abort)
    sources = AdapterSources(
        settings.allowed_sources,
        adapters,
        FetchLimits(settings.max_adapter_bytes, settings.upload_timeout_s, settings.upload_idle_timeout_s),
        settings.max_uploads,
        lambda error: metrics.upload_finished(upload_result(error)),
    )
    follower = make_follower(store, adapters, settings)
    await adapters.start()
    await start_following(follower)
    reconciler = Reconciler(asked_anyway, scheduler)
    monitor = EngineMonitor(asked_anyway, side.status, metrics, reconciler, served.by_engine_id)
    snapshot = _Snapshot(store, registry, scheduler, monitor, side.health, adapters.following, side.base_running)
    prometheus.register(StateCollector(metrics, snapshot.take))
    page = MetricsPage(prometheus)
    fresh = _FreshPage(page, monitor, snapshot)
    listener = await serve_metrics(settings, page)
    monitor.start()

    async def close() -> None:
        monitor.stop()
        await sources.close()
        if follower is not None:
            await follower.close()
        await adapters.close()
        if side.specs is not None:
            await side.specs.close()
        if listener is not None:
            await listener.close()

    return Services(
        settings=settings,
        engine=engine,
        engine_health=side.health,
        base_names=side.base_names,
        max_model_len=side.max_model_len,
        registry=registry,
        adapters=adapters,
        following=adapters.following,
        scheduler=scheduler,
        metrics=metrics,
        metrics_page=fresh,
        console_metrics=SharedMetrics(fresh),
        keys=settings.key_ring,
        origin=OriginPolicy(side.is_local, side.allowed_origins),
        rate_limits=RateLimits(settings.key_max_requests, settings.key_tokens_per_minute),
        access_log=AccessLog(settings.log_format),
        upload_limits=UploadLimits(
            settings.max_adapter_bytes, settings.upload_timeout_s, settings.upload_idle_timeout_s
        ),
        upload_slots=asyncio.Semaphore(settings.max_uploads),
        sources=sources,
        cache_salt_secret=store.secret,
        metrics_address=None if listener is None else listener.address,
        bodies=RequestBodies(
            BodyLimits(side.max_model_len, settings.max_body_bytes, settings.max_sequences),
            side.request_models,
            takes_tools=side.takes_tools,
        ),
        close=close,
    )


class _ServedVersions:
    """Keeps vLLM's table of names and the metrics in step with the versions served (ServiceEvents)."""

    metrics: EventCounters
    registry: Registry

    def __init__(self, side: EngineSide) -> None:
        self._names, self._name_entry = side.names, side.name_entry
        self.by_engine_id: dict[int, str] = {}

    def is_known(self, name: str) -> bool:
        return self.registry.has(name)

    def version_added(self, version: Version) -> None:
        self._names[version.id] = self._name_entry(version)
        self.by_engine_id[version.ref.engine_id] = version.name

    def version_removed(self, version: Version) -> None:
        self._names.pop(version.id, None)
        self.by_engine_id.pop(version.ref.engine_id, None)

    def name_removed(self, name: str) -> None:
        self.metrics.adapter_deleted(name)

    def upload_finished(self, result: str) -> None:
        self.metrics.upload_finished(result)


@dataclass(frozen=True)
class _FreshPage:
    """GET /metrics: the page, with the monitor that brings it up to date."""

    page: MetricsPage
    monitor: EngineMonitor
    snapshot: "_Snapshot"

    async def refresh(self) -> None:
        await self.monitor.refresh()

    def render(self, names: list[str], accept_encoding: str) -> tuple[bytes, dict[str, str]]:
        return render(self.page, names, accept_encoding)

    def choice(self, adapter: str | None) -> bytes:
        return render_choice(self.page, self.snapshot.state_of, adapter)


@dataclass(frozen=True)
class _Snapshot:
    """What a scrape reads."""

    store: Store
    registry: Registry
    scheduler: ResidencyScheduler
    monitor: EngineMonitor
    health: EngineHealth
    following: Following
    base_running: Callable[[], int]

    def take(self) -> StateSnapshot:
        """What the server holds now, from memory. A scrape asks on a thread of its own."""
        adapters: dict[str, AdapterState] = {}
        needs: list[Need] = []
        for record, versions in self.registry.snapshot():
            adapters[record.name], need = self._state(record, versions)
            if need is not None:
                needs.append(need)
        moe_layers = self.monitor.status.moe_layers
        return StateSnapshot(
            adapters=adapters,
            max_lora=self._capacity(adapters, needs),
            base_running=self.base_running(),
            base_waiting=self.scheduler.base_waiting(),
            device_rows_used=self.scheduler.rows_used,
            device_rows_total=self.monitor.status.rows_total,
            store_bytes=self.registry.store_bytes(),
            store_free_bytes=self.store.free_bytes(),
            moe_layers=moe_layers,
            step_load_bytes=self.monitor.counters.step_load_bytes,
            is_ready=moe_layers > 0 and self.health.doubt() is None and self.following.problem() is None,
            store_silent_s=self.following.silent_s(),
            store_names_behind=self.following.names_behind(),
        )

    def state_of(self, name: str) -> AdapterState | None:
        """The state of one name, the base's included; None for one that is not there."""
        if name == self.registry.base_names[0]:
            return AdapterState(self.base_running(), self.scheduler.base_waiting(), tier=None)
        record = self.registry.record(name)
        return None if record is None else self._state(record, self.registry.versions(name))[0]

    def _state(self, record: AdapterRecord, versions: list[Version]) -> tuple[AdapterState, Need | None]:
        """What one adapter does, and what its active version takes of the device (None: it has none)."""
        served = [version for version in versions if version.accepted is not None]
        active = next((version for version in served if version.number == record.active), None)
        state = AdapterState(
            running=sum(version.requests_running for version in served),
            waiting=sum(self.scheduler.requests_waiting(version.ref) for version in served),
            tier=self.scheduler.tier(active.ref) if active is not None else None,
            pinned=record.pinned,
            rank=None if active is None else active.rank,
        )
        return state, active.accepted.need if active is not None and active.accepted is not None else None

    def _capacity(self, adapters: Mapping[str, AdapterState], needs: list[Need]) -> int:
        on_device = sum(each.tier == "device" for each in adapters.values())
        capacity = self.scheduler.capacity
        return device_capacity(
            on_device,
            capacity.rows - self.scheduler.rows_used,
            [need.rows for need in needs if need.rows],
            capacity.lora_slots - self.scheduler.loaded.holding["lora_slots"].total,
            capacity.running,
        )


def _capacity(side: EngineSide, settings: Settings) -> Capacity:
    host_bytes = settings.host_cache_bytes
    return Capacity(
        rows=side.status.rows_total,
        lora_slots=side.status.lora_slots,
        host_bytes=memory_bytes() // 10 if host_bytes is None else host_bytes,
        running=side.max_running,
        sequences=side.max_sequences,
    )
