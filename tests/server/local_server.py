"""Our server with a fake engine on a real socket and the loop of `perft serve`, in a thread of the test's process."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.api.dependencies import Services
from server.app.connections import loop_factory, uvicorn_arguments
from server.middleware.access_log import AccessLog
from tests.server.fake_server import build_app, settings_of
from tests.server.fakes import FakeEngine


@dataclass
class LocalServer:
    """A server at work. log: of access, as JSON lines."""

    app: FastAPI
    server: uvicorn.Server
    log: io.StringIO
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Those that it holds."""
        return len(self.server.server_state.connections)

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was logged."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@contextmanager
def local_server(folder: Path, **settings: Any) -> Iterator[LocalServer]:
    """The server over a store in `folder`, for the duration."""
    chosen = settings_of(folder / "store", **settings)
    app = build_app(chosen, FakeEngine())
    config = uvicorn.Config(
        app, port=0, log_level="warning", timeout_graceful_shutdown=1, **uvicorn_arguments(chosen)
    )  # fmt: skip
    running = LocalServer(app, uvicorn.Server(config), io.StringIO())

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory(chosen)) as runner:
            runner.run(running.server.serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not running.server.started:
            assert thread.is_alive(), "it did not start"
            time.sleep(0.005)
        running.port = running.server.servers[0].sockets[0].getsockname()[1]
        app.state.services = replace(running.services, access_log=AccessLog("json", running.log))
        yield running
    finally:
        running.server.should_exit = True
        thread.join()
