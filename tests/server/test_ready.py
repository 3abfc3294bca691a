"""Whether the server says that it is ready."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.api import health
from server.engine.protocol import EngineStatus
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import FakeEngine


def test_ready_says_whether_the_engine_carries_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    with TestClient(build_app(settings_of(tmp_path / "store"), engine)) as client:
        assert client.get("/ready").json() == {"status": "ready", "moe_layers": 2}
        assert "\nperft_ready 1.0\n" in page(client)
        engine.answer = EngineStatus(0, None, 0, 0, problem="the layers are gone")
        answer = client.get("/ready")
        assert answer.status_code == 503 and "the layers are gone" in answer.json()["error"]["message"]
        assert "\nperft_ready 0.0\n" in page(client)
        monkeypatch.setattr(health, "READY_TIMEOUT_S", 0.05)
        engine.delays["status"] = 3600
        answer = client.get("/ready")
        assert answer.status_code == 503 and "TimeoutError" in answer.json()["error"]["message"]
        engine.delays.clear()
        engine.down = True
        answer = client.get("/ready")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"


def page(client: TestClient) -> str:
    return client.get("/metrics", headers=bearer()).text


def test_ready_is_503_while_the_server_starts(tmp_path: Path) -> None:
    answer = TestClient(build_app(settings_of(tmp_path / "store"), FakeEngine())).get("/ready")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"
