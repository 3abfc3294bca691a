"""Owns servers for benchmarks: started as `make serve` starts one, or with a pool of a given size."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.traffic import Client
from server.demo.__main__ import ENVIRONMENT, base_arguments
from server.demo.base.build import default_folder
from tests.server.processes import ServerProcess, free_port, launch


@contextmanager
def demo_server(base: Path, folder: Path) -> Iterator[Client]:
    """The command of `make serve`, on a free port and a store in `folder`, which is made.

    For another base than the demo's: the command that `make serve` ends in, without the demo's own adapters.
    """
    port = free_port()
    arguments = ["-m", "server.demo", "--port", str(port)]
    if base != default_folder():
        arguments = ["-m", "server.cli", *base_arguments(base, port)]
    with _running(arguments, port, folder) as client:
        yield client


@contextmanager
def pool_server(base: Path, folder: Path, pool_rows: int, *flags: str) -> Iterator[Client]:
    """`perft serve` as the demo runs it, with a pool of `pool_rows` rows."""
    port = free_port()
    arguments = ["-m", "server.cli", *base_arguments(base, port), "--pool-rows", str(pool_rows), *flags]
    with _running(arguments, port, folder) as client:
        yield client


@contextmanager
def _running(arguments: list[str], port: int, folder: Path) -> Iterator[Client]:
    folder.mkdir(parents=True)
    key = secrets.token_urlsafe(24)
    server: ServerProcess = launch(
        arguments, port, folder / "server.log",
        **{name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()},
        PERFT_ADAPTER_STORE=str(folder / "store"), PERFT_ADMIN_KEY=key,
    )  # fmt: skip
    try:
        server.wait_until("/ready")
        yield Client(server.url, key)
    finally:
        server.stop()
