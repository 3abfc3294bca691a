"""The server's app on the fake engine, on a real socket, in a thread of the tests' process."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from integration.console.chat import add_chat
from integration.console.contents import fill
from server.app.connections import loop_factory, uvicorn_arguments
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import FakeEngine, ready_status

POOL_ROWS = 2000


def key(label: str) -> str:
    return bearer(label)["Authorization"].removeprefix("Bearer ")


@dataclass
class LocalServer:
    """A server at work. asked: every request so far, as (method, path with its query)."""

    app: FastAPI
    engine: FakeEngine
    port: int
    asked: list[tuple[str, str]]
    has_keys: bool

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def local_server(
    folder: Path,
    names: int = 30,
    has_keys: bool = False,
    has_admin: bool = False,
    root_path: str = "",
    pace: float = 0.0,
) -> Iterator[LocalServer]:
    """The server over `names` adapters. has_keys: admin, alice, bob and metrics; has_admin: admin only; else none."""
    store = folder / "store"
    fill(store, names)
    admin = {"api_keys": [], "admin_key": key("admin") if has_admin else None}
    keys: dict[str, Any] = {"metrics_key": key("metrics")} if has_keys else admin
    settings = settings_of(store, **keys, drain_timeout_s=600.0)
    engine = FakeEngine(ready_status(POOL_ROWS))
    app = build_app(settings, engine)
    add_chat(app, pace)
    asked = list[tuple[str, str]]()

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked.append((scope["method"], f"{scope['path']}?{scope['query_string'].decode()}".rstrip("?")))
        await app(scope, receive, send)

    config = uvicorn.Config(
        noted, port=0, log_level="warning", timeout_graceful_shutdown=1, root_path=root_path,
        **uvicorn_arguments(settings),
    )  # fmt: skip
    server = uvicorn.Server(config)

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory(settings)) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "it did not start"
            time.sleep(0.01)
        yield LocalServer(app, engine, server.servers[0].sockets[0].getsockname()[1], asked, has_keys)
    finally:
        server.should_exit = True
        thread.join()
