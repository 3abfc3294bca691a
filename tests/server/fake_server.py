"""Our whole server but vLLM: guard, gate, routes, catalog and store, over the fake engine and a toy completion.

`python -m tests.server.fake_server --store FOLDER --port N` serves it, for tests that kill a server or throw broken
bodies at one. `bearer` has the keys.
"""

import argparse
import asyncio
import io
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from adapters import Limits, Store
from server.catalog import Catalog, adapter_deleted
from server.contract_route import ContractRoute
from server.exchange import CURRENT, Exchange
from server.gate import Gate, GateParts
from server.guard import Admission, Guard
from server.intake import Intake
from server.keys import Caller, KeyRing
from server.limits import KeyLimits
from server.logs import RequestLog
from server.metrics import AdapterMetrics
from server.reach import Reach
from server.residency import Capacity, ResidencyPlan
from server.routes import attach
from server.uploads import UploadLimits
from server.versions import Version
from tests.server.fakes import BASE, FakeEngine, ready_status

BASE_NAMES = ["base", "org/alias"]
LABELS = ("alice", "bob")
LIMITS = UploadLimits(max_adapter_bytes=1024**2, timeout_s=20, idle_timeout_s=5)
LOAD_TIMEOUT_S = 20.0


def bearer(label: str = "admin") -> dict[str, str]:
    """The header of the key with that label: admin, alice or bob."""
    return {"Authorization": f"Bearer {label}-has-a-key-of-some-length"}


def _key(label: str) -> str:
    return bearer(label)["Authorization"].removeprefix("Bearer ")


@dataclass
class Quotas:
    """What the settings say of the store."""

    max_adapters: int = 1000
    max_versions: int = 1000
    max_store_bytes: int | None = None
    drain_timeout_s: float = 10.0


@dataclass
class Watch:
    """Keeps what the catalog and the residency plan tell: (what, whom)."""

    told: list[tuple[str, str]] = field(default_factory=list)

    def served(self, version: Version) -> None:
        self.told.append(("served", version.id))

    def gone(self, version: Version) -> None:
        self.told.append(("gone", version.id))

    def name_gone(self, name: str) -> None:
        self.told.append(("name_gone", name))

    def uploaded(self, result: str) -> None:
        self.told.append(("uploaded", result))

    def record(self, action: str, caller: Caller, **details: Any) -> None:
        self.told.append((action, str(caller.label)))

    def load_finished(self, tier: str, seconds: float, result: str) -> None:
        self.told.append((f"load {tier}", result))

    def evicted(self, tier: str) -> None:
        self.told.append(("evicted", tier))


class Completion(BaseModel):
    """A toy of OpenAI's request: max_tokens of them, each after `seconds_per_token`."""

    model: str
    max_tokens: int = 4
    seconds_per_token: float = 0.0


def build_app(store: Path, engine: FakeEngine, quotas: Quotas | None = None, limits: UploadLimits = LIMITS) -> FastAPI:
    """The app over the store at `store`, which is open for as long as the app's lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.restart()
        catalog = await open_catalog(app, store, engine, quotas or Quotas(), limits)
        yield
        await catalog.close()

    app = FastAPI(title="perft-server", version="1", lifespan=lifespan)
    attach(app)
    app.add_middleware(Gate)
    app.add_middleware(Guard)
    app.router.add_api_route("/health", health, include_in_schema=False)
    app.router.add_api_route(
        "/v1/completions", complete, methods=["POST"], include_in_schema=False, route_class_override=ContractRoute
    )
    return app


async def open_catalog(app: FastAPI, store: Path, engine: FakeEngine, quotas: Quotas, limits: UploadLimits) -> Catalog:
    """Put what the routes need into the app's state."""
    state = app.state
    state.watch, state.ends = Watch(), dict[str, asyncio.Event]()
    status = await engine.status()
    capacity = Capacity(status.rows_total, status.lora_slots, host_bytes=1024**3, running=8)
    opened = await asyncio.to_thread(Store.open, store)
    catalog = Catalog(
        opened,
        ResidencyPlan(engine, capacity, state.watch),
        Intake(BASE, Limits(limits.max_adapter_bytes), status.rows_total),
        BASE_NAMES,
        quotas,
        state.watch,
        lambda request_id: _abort(state.ends, request_id),
    )
    await catalog.start()
    metrics = AdapterMetrics(CollectorRegistry())
    keys = KeyRing([(label, _key(label)) for label in LABELS], _key("admin"))
    state.perft_catalog, state.perft_engine, state.perft_upload_limits = catalog, engine, limits
    state.perft_max_model_len = 512
    state.perft_gate = GateParts(catalog, metrics, opened.secret, LOAD_TIMEOUT_S)
    state.perft_guard = Admission(keys, Reach(is_local=True), KeyLimits(), RequestLog(stream=io.StringIO()))
    return catalog


async def health() -> dict[str, Any]:
    return {}


async def complete(body: Completion, request: Request) -> dict[str, Any]:
    """Answers with the name of the version that ran, once for each token."""
    exchange = CURRENT.get()
    assert exchange is not None
    async with engine_request(request.app, exchange) as ended:
        for _ in range(body.max_tokens):
            await asyncio.sleep(body.seconds_per_token)
            if ended.is_set():
                assert exchange.version is not None
                raise adapter_deleted(exchange.version)
    text = " ".join([body.model] * body.max_tokens)
    usage = {"completion_tokens": body.max_tokens}
    return {"object": "text_completion", "model": body.model, "choices": [{"text": text}], "usage": usage}


@asynccontextmanager
async def engine_request(app: FastAPI, exchange: Exchange) -> AsyncIterator[asyncio.Event]:
    """Run on the exchange's version, as `server.inference` does; the event says that the request was aborted."""
    version, ended = exchange.version, asyncio.Event()
    if version is None:
        yield ended
        return
    request_id = uuid.uuid4().hex
    async with app.state.perft_catalog.plan.lease(version.engine, LOAD_TIMEOUT_S):
        await exchange.place.aclose()
        if version.is_deleted:
            raise adapter_deleted(version)
        app.state.ends[request_id] = ended
        version.running.add(request_id)
        try:
            async with app.state.perft_engine.request(version.engine):
                yield ended
        finally:
            version.running.discard(request_id)
            del app.state.ends[request_id]


async def _abort(ends: dict[str, asyncio.Event], request_id: str) -> None:
    ends[request_id].set()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the fake device pool")
    parser.add_argument("--max-adapter-bytes", type=int, default=LIMITS.max_adapter_bytes)
    parser.add_argument("--upload-timeout", type=float, default=LIMITS.timeout_s)
    parser.add_argument("--upload-idle-timeout", type=float, default=LIMITS.idle_timeout_s)
    parser.add_argument("--drain-timeout", type=float, default=Quotas.drain_timeout_s)
    parser.add_argument(
        "--delay", action="append", default=[], metavar="OPERATION=SECONDS", help="how long prepare, place, ... take"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    engine = FakeEngine(ready_status(args.rows))
    for operation, _, seconds in (delay.partition("=") for delay in args.delay):
        engine.delays[operation] = float(seconds)
    limits = UploadLimits(args.max_adapter_bytes, args.upload_timeout, args.upload_idle_timeout)
    app = build_app(args.store, engine, Quotas(drain_timeout_s=args.drain_timeout), limits)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
