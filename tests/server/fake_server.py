"""Our whole server without vLLM: middleware, routes, registry and store, over the fake engine and a toy completion.

`python -m tests.server.fake_server --store FOLDER --port N` serves it, for tests that kill a server or send it
broken bodies; it takes the flags of `perft serve` that are ours. `bearer` has the keys.
"""

import argparse
import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from perft.logs import escape_records
from server.api.dependencies import Services
from server.api.error_responses import ContractRoute
from server.api.route_table import more_routes, prune
from server.app.connections import uvicorn_arguments
from server.app.plugin import attach
from server.app.services import EngineSide, build_services
from server.engine.health import EngineHealth, EngineProcesses
from server.inference.request_context import CURRENT, RequestContext
from server.registry.version import adapter_deleted
from server.settings.sources import Settings, add_flags, load
from tests.server.fakes import FakeEngine, ready_status

BASE_NAMES = ["base", "org/alias"]
MAX_RUNNING = 8
PATIENCE_S = 3600.0
DEFAULTS: dict[str, Any] = {"max_adapter_bytes": 1024**2} | dict.fromkeys(
    (
        *("upload_timeout_s", "upload_idle_timeout_s", "load_timeout_s", "header_timeout_s"),
        *("body_timeout_s", "body_idle_timeout_s", "write_timeout_s", "keep_alive_s"),
    ),
    PATIENCE_S,
)
"""A busy machine sends and loads slowly too."""


def bearer(label: str = "admin") -> dict[str, str]:
    """The header of the key with that label: admin, alice or bob."""
    return {"Authorization": f"Bearer {_key(label)}"}


def settings_of(store: Path, **values: Any) -> Settings:
    """Settings of a server with all three keys; `values` override the tests' defaults."""
    keys = {"api_keys": [f"{label}={_key(label)}" for label in ("alice", "bob")], "admin_key": _key("admin")}
    return Settings(**(DEFAULTS | keys | {"adapter_store": store} | values))


def _key(label: str) -> str:
    return f"{label}-has-a-key-of-some-length"


class Completion(BaseModel):
    """A toy of OpenAI's request: max_tokens tokens, each after `seconds_per_token`."""

    model: str
    max_tokens: int = 4
    seconds_per_token: float = 0.0
    stream: bool = False


def build_app(settings: Settings, engine: FakeEngine, processes: EngineProcesses | None = None) -> FastAPI:
    """The app. The store is open during the app's lifespan, and the engine restarts with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.restart()
        ends = dict[str, asyncio.Event]()

        async def abort(request_id: str) -> None:
            ends[request_id].set()

        engine_health = EngineHealth(settings.engine_timeout_s, processes)
        engine_health.start()
        side = EngineSide(
            engine=engine,
            health=engine_health,
            status=await engine.status(),
            base_names=BASE_NAMES,
            max_model_len=512,
            names={},
            name_entry=lambda version: version.id,
            abort=abort,
            max_running=MAX_RUNNING,
            is_local=True,
        )
        services = await build_services(side, settings)
        app.state.ends, app.state.services, app.state.engine = ends, services, engine
        yield
        await services.close()
        engine_health.stop()

    app = FastAPI(title="perft-server", version="1", lifespan=lifespan)
    attach(app)
    app.router.add_api_route("/health", health, include_in_schema=False)
    app.router.add_api_route(
        "/v1/completions", complete, methods=["POST"], include_in_schema=False, route_class_override=ContractRoute
    )
    prune(app, more=more_routes(settings))
    return app


async def health() -> dict[str, Any]:
    return {}


async def complete(body: Completion, request: Request) -> Any:
    """Answers with the name of the version that ran, once for each token."""
    context = CURRENT.get()
    assert context is not None
    if body.stream:
        return StreamingResponse(events(body, request.app, context), media_type="text/event-stream")
    async with engine_request(request.app, context) as ended:
        for _ in range(body.max_tokens):
            await asyncio.sleep(body.seconds_per_token)
            if ended.is_set():
                assert context.version is not None
                raise adapter_deleted(context.version)
    text = " ".join([body.model] * body.max_tokens)
    usage = {"completion_tokens": body.max_tokens}
    return {"object": "text_completion", "model": body.model, "choices": [{"text": text}], "usage": usage}


async def events(body: Completion, app: FastAPI, context: RequestContext) -> AsyncIterator[bytes]:
    """The tokens of a streamed completion."""
    async with engine_request(app, context):
        for _ in range(body.max_tokens):
            await asyncio.sleep(body.seconds_per_token)
            yield b"data: " + json.dumps({"model": body.model, "choices": [{"text": body.model}]}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


@asynccontextmanager
async def engine_request(app: FastAPI, context: RequestContext) -> AsyncIterator[asyncio.Event]:
    """Run on the context's version, as `server.inference.engine_hook` does; the event is set if it is aborted."""
    version, ended = context.version, asyncio.Event()
    if version is None:
        yield ended
        return
    request_id = uuid.uuid4().hex
    services: Services = app.state.services
    async with context.lease(services.scheduler, services.settings.load_timeout_s):
        await context.first_lease.aclose()
        if version.is_deleted:
            raise adapter_deleted(version)
        app.state.ends[request_id] = ended
        version.running.add(request_id)
        version.requests_running += 1
        try:
            engine: FakeEngine = app.state.engine
            async with engine.request(version.ref):
                yield ended
        finally:
            version.running.discard(request_id)
            version.requests_running -= 1
            del app.state.ends[request_id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the fake device pool")
    parser.add_argument("--delay", action="append", default=[], metavar="OPERATION=SECONDS", help="prepare, place, ...")
    parser.add_argument("--hold", action="append", default=[], metavar="OPERATION=FILE", help="while the file is there")
    add_flags(parser)
    args = parser.parse_args()
    engine = FakeEngine(ready_status(args.rows))
    for operation, _, seconds in (delay.partition("=") for delay in args.delay):
        engine.delays[operation] = float(seconds)
    for operation, _, file in (hold.partition("=") for hold in args.hold):
        engine.holds[operation] = Path(file)
    settings = settings_of(args.store, **load(args).model_dump(exclude_unset=True))
    app = build_app(settings, engine)
    escape_records()
    uvicorn.run(
        app, host="127.0.0.1", port=args.port, log_level="warning", timeout_graceful_shutdown=5,
        **uvicorn_arguments(settings),
    )  # fmt: skip


if __name__ == "__main__":
    main()
