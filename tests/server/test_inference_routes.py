"""What a request's `model` selects, over the toy completion: resolved once, named in the answer, never the base's."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.api.dependencies import Services
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.synthetic import write_adapter


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    assert not engine.broken_rules


@pytest.fixture
def client(tmp_path: Path, engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(build_app(settings_of(tmp_path / "store"), engine), headers=bearer("alice")) as client:
        for seed in range(2):
            folder = write_adapter(tmp_path / f"given-{seed}", BASE, seed)
            files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
            assert client.post("/v1/adapters", data={"name": "poet"}, files=files, headers=bearer()).is_success
        yield client


@pytest.mark.parametrize(
    ("model", "answered_by"),
    [("base", "base"), ("org/alias", "org/alias"), ("poet", "poet@2"), ("poet@1", "poet@1"), ("poet@2", "poet@2")],
)
def test_the_answer_names_what_was_resolved(
    client: TestClient, engine: FakeEngine, model: str, answered_by: str
) -> None:
    answer = client.post("/v1/completions", json={"model": model})
    assert answer.status_code == 200 and answer.json()["model"] == answered_by
    assert engine.calls.count(("request", answered_by)) == ("@" in answered_by)


@pytest.mark.parametrize("model", ["nobody", "poet@3", "poet@", "poet@01", "POET", " poet", "x" * 5000])
def test_an_unknown_name_is_404_with_openais_error(client: TestClient, model: str) -> None:
    answer = client.post("/v1/completions", json={"model": model})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model" and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


def test_made_up_names_leave_nothing_behind(client: TestClient) -> None:
    services: Services = client.app.state.services  # type: ignore[attr-defined]

    def sizes() -> dict[str, int]:
        kept = {**vars(services.registry), **vars(services.adapters), **vars(services.scheduler)}
        return {key: len(value) for key, value in kept.items() if hasattr(value, "__len__")}

    before = sizes()
    for number in range(200):
        assert client.post("/v1/completions", json={"model": f"made-up-{number}"}).status_code == 404
    assert before == sizes()


@pytest.mark.parametrize("body", ["", "not json", "[]", "[" * 5000])
def test_what_is_no_request_is_400(client: TestClient, body: str) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and json.loads(answer.text)["error"]["code"] == "invalid_request"


def test_without_a_key_nothing_is_answered(client: TestClient) -> None:
    del client.headers["authorization"]
    assert client.post("/v1/completions", json={"model": "base"}).status_code == 401
