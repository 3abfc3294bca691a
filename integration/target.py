"""The server of the integration tests: one that they start, or one that runs already.

A running one (`--server-url`) is described by the environment: API_KEY, ADMIN_KEY, METRICS_KEY, ADAPTER (a name with
version 1, active), BASE (the base's served name).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.demo.__main__ import BASE_NAME
from tests.server.processes import free_port, launch

MAX_ADAPTER_BYTES = 4_000_000
REQUESTS_AT_ONCE = 4


@dataclass(frozen=True)
class Target:
    """A running server and the keys to it."""

    url: str
    api_key: str = "integration-inference-key"
    admin_key: str = "integration-admin-key"
    metrics_key: str = "integration-metrics-key"
    adapter: str = "pirate"
    base: str = BASE_NAME

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.url.partition("://")[2].rstrip("/")

    def environment(self) -> dict[str, str]:
        """What the contract programs read."""
        return {
            "BASE_URL": f"{self.url}/v1",
            "API_KEY": self.api_key,
            "ADMIN_KEY": self.admin_key,
            "ADAPTER": self.adapter,
            "BASE": self.base,
            "MAX_ADAPTER_BYTES": str(MAX_ADAPTER_BYTES),
            "REQUESTS_AT_ONCE": str(REQUESTS_AT_ONCE),
        }


def running(url: str) -> Target:
    """A server that runs already."""
    names = {"API_KEY", "ADMIN_KEY", "METRICS_KEY", "ADAPTER", "BASE"}
    return Target(url.rstrip("/"), **{name.lower(): os.environ[name] for name in names if name in os.environ})


@contextmanager
def started(folder: Path) -> Iterator[Target]:
    """The demo on a free port, with keys, its own store, and limits small enough to reach."""
    port = free_port()
    target = Target(f"http://127.0.0.1:{port}")
    server = launch(
        ["-m", "server.demo", "--port", str(port)],
        port,
        folder / "server.log",
        PERFT_API_KEYS=f"integration={target.api_key}",
        PERFT_ADMIN_KEY=target.admin_key,
        PERFT_METRICS_KEY=target.metrics_key,
        PERFT_ADAPTER_STORE=str(folder / "store"),
        PERFT_MAX_ADAPTER_BYTES=str(MAX_ADAPTER_BYTES),
        PERFT_KEY_MAX_REQUESTS=str(REQUESTS_AT_ONCE),
    )
    try:
        server.wait_until("/ready")
        yield target
    finally:
        code = server.stop()
    assert code == 0, server.log.read_text()[-3000:]
