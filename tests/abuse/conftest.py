"""One real server, with its limits as they are by default, for all attacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.abuse.target import Target
from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.tiny_server import BASE_NAME, KEYS, TinyClient

ADAPTERS = ("herd-1", "herd-2", "herd-3")
VICTIMS = "witness"
"""The adapter of the undisturbed streams."""


def prepare(server: ServerProcess, folder: Path) -> Target:
    """Upload the adapters of the attacks and of the witness; the target of the attacks."""
    client = TinyClient(server.url, KEYS["admin"])
    for seed, name in enumerate((*ADAPTERS, VICTIMS), start=1):
        client.upload(name, tiny_server.adapter(folder / name, seed)).raise_for_status()
    client.close()
    return Target("127.0.0.1", server.port, KEYS["alice"], BASE_NAME, ADAPTERS)


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("abuse")
    model = tiny_server.build_model(folder / "model")
    running = tiny_server.start(model, folder / "store", *tiny_server.KEY_ARGUMENTS)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def target(attacked: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return prepare(attacked, tmp_path_factory.mktemp("contents"))
