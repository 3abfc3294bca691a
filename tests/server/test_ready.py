"""Whether the server says that it is ready."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.engine import EngineStatus
from tests.server.fake_server import build_app
from tests.server.fakes import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(tmp_path: Path, engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(build_app(tmp_path / "store", engine)) as client:
        yield client


def test_ready_says_whether_the_engine_carries_the_operator(client: TestClient, engine: FakeEngine) -> None:
    assert client.get("/ready").json() == {"status": "ready", "moe_layers": 2}
    engine.answer = EngineStatus(0, None, 0, 0, problem="the layers are gone")
    answer = client.get("/ready")
    assert answer.status_code == 503 and "the layers are gone" in answer.json()["error"]["message"]
    engine.down = True
    answer = client.get("/ready")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"


def test_ready_is_503_before_there_is_an_engine(client: TestClient) -> None:
    client.app.state.perft_engine = None  # type: ignore[attr-defined]
    assert client.get("/ready").json()["error"]["code"] == "engine_unavailable"
