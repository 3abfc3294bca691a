"""Owns `Services`: what a running server is made of, one typed object on the app, and how a route gets its part of it.

Invariant: `app.state.services` is absent until everything in it can be used; until then every route but /health
and the files of the console says that the server is starting.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, FastAPI, Request

from server.auth.access import AccessRules, Asked
from server.auth.keys import Caller, KeyRing
from server.auth.origin import OriginPolicy
from server.auth.rate_limits import RateLimits
from server.bodies.check import RequestBodies
from server.engine.health import EngineHealth
from server.engine.protocol import Engine
from server.following.following import Alone, Following
from server.inference.request_context import RequestFacts
from server.inference.timing import RequestMetrics
from server.registry.listing.page import ListQuery
from server.registry.registry import Registry
from server.registry.service import AdapterService
from server.residency.scheduler import ResidencyScheduler
from server.settings.model import Settings
from server.sharing.once import OncePerSecond
from server.sharing.turns import Turns
from server.sources.loading import AdapterSources
from server.uploads.receive import UploadLimits


class AccessLog(Protocol):
    """Where every request leaves one line (middleware/access_log)."""

    def write(
        self,
        request_id: str,
        label: str | None,
        method: str,
        path: str | None,
        status: int,
        seconds: float,
        facts: RequestFacts,
    ) -> object: ...


class Metrics(RequestMetrics, Protocol):
    """What routes and middleware count."""

    def upload_finished(self, result: str) -> None: ...


class MetricsPage(Protocol):
    """GET /metrics. `refresh` asks the workers for their counters; `render` is slow with many adapters."""

    async def refresh(self) -> None: ...

    def render(self, names: list[str], accept_encoding: str) -> tuple[bytes, dict[str, str]]: ...


class SharedMetrics(Protocol):
    """GET /console/metrics: one rendering a second for all who ask. adapter: only its series (None: of all)."""

    async def text(self, adapter: str | None = None) -> tuple[bytes, bytes]:
        """In Prometheus' text format: as it is, and compressed with gzip."""


@dataclass
class Lifecycle:
    """Whether new requests are still admitted, why not, and how many responses are being sent."""

    is_draining: bool = False
    reason: str = "the server is shutting down; retry on another server"
    responses_running: int = 0


@dataclass(frozen=True)
class Services:
    """The parts of a running server. base_names: the names the base model is served under.

    upload_slots: uploads received at once. cache_salt_secret: 32 random bytes of this store. max_model_len: tokens.
    metrics_address: HOST:PORT of the listener for /metrics alone; None if /metrics is served here. list_turns: of the
    work for lists of adapters. lists: the latest answers, by caller, query, and what the registry's `changes` was.
    """

    settings: Settings
    engine: Engine
    engine_health: EngineHealth
    base_names: list[str]
    max_model_len: int
    registry: Registry
    adapters: AdapterService
    scheduler: ResidencyScheduler
    metrics: Metrics
    metrics_page: MetricsPage
    console_metrics: SharedMetrics
    keys: KeyRing
    origin: OriginPolicy
    rate_limits: RateLimits
    access_log: AccessLog
    upload_limits: UploadLimits
    upload_slots: asyncio.Semaphore
    sources: AdapterSources
    cache_salt_secret: bytes
    close: Callable[[], Awaitable[None]]
    metrics_address: str | None = None
    bodies: RequestBodies = field(default_factory=RequestBodies)
    list_turns: Turns = field(default_factory=Turns)
    lists: OncePerSecond[tuple[Caller, ListQuery, int], bytes] = field(default_factory=OncePerSecond)
    following: Following = field(default_factory=Alone)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @property
    def access(self) -> AccessRules:
        """Who may call which route."""
        return AccessRules(self.keys, self.origin)


def services_of(app: FastAPI) -> Services | None:
    """The app's services; None while the server is starting."""
    services: Services | None = getattr(app.state, "services", None)
    return services


async def _services(request: Request) -> Services:
    services = services_of(request.app)
    assert services is not None, "access control admits nothing before there are services"
    return services


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _asked(request: Request) -> Asked:
    asked: Asked = request.state.asked
    return asked


ServicesOf = Annotated[Services, Depends(_services)]
CallerOf = Annotated[Caller, Depends(_caller)]
AskedOf = Annotated[Asked, Depends(_asked)]


async def _registry(request: Request, services: ServicesOf) -> Registry:
    """With what other servers changed until now. Raises StoreUnreachableError."""
    await services.following.fresh(request.path_params.get("name"))
    return services.registry


async def _adapters(services: ServicesOf) -> AdapterService:
    return services.adapters


RegistryOf = Annotated[Registry, Depends(_registry)]
AdapterServiceOf = Annotated[AdapterService, Depends(_adapters)]
