"""One real server of a tiny model for all tests of adapters over HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import TinyClient


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.build_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`perft serve` with keys (tiny_server.KEYS) and a pool of POOL_ADAPTERS. Tests clean up the adapters they make.

    It waits as long as a busy machine takes: for a place on the device, for what runs on a deleted version.
    """
    store = tmp_path_factory.mktemp("server") / "store"
    patient = ["--drain-timeout-s", "3600", "--load-timeout-s", "3600"]
    running = tiny_server.start(tiny_model, store, *tiny_server.KEY_ARGUMENTS, *patient)
    yield running
    running.stop()


@contextmanager
def client_of(server: ServerProcess, label: str) -> Iterator[TinyClient]:
    client = TinyClient(server.url, tiny_server.KEYS[label])
    yield client
    client.close()


@pytest.fixture
def admin(server: ServerProcess) -> Iterator[TinyClient]:
    with client_of(server, "admin") as client:
        yield client


@pytest.fixture
def alice(server: ServerProcess) -> Iterator[TinyClient]:
    with client_of(server, "alice") as client:
        yield client


@pytest.fixture
def bob(server: ServerProcess) -> Iterator[TinyClient]:
    with client_of(server, "bob") as client:
        yield client
