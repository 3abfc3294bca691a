"""The check of names, on a small app of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from adapters import read_folder
from server.model_check import ModelCheck
from server.registry import Registry, ServedVersion
from tests.server.fakes import BASE
from tests.synthetic import write_adapter


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    app = FastAPI()
    app.add_middleware(ModelCheck)

    @app.post("/v1/echo")
    async def echo(request: Request) -> dict[str, Any]:
        return {"body": (await request.body()).decode()}

    app.state.perft_registry = Registry(["base", "alias"])
    app.state.perft_registry.add(
        ServedVersion("poet", 1, 1, read_folder(write_adapter(tmp_path / "poet", BASE, 0), BASE))
    )
    return TestClient(app)


@pytest.mark.parametrize("model", ["base", "alias", "poet", "poet@1"])
def test_a_served_name_passes_with_its_body_untouched(client: TestClient, model: str) -> None:
    body = json.dumps({"model": model, "n": 1.0, "text": "ä\ud83d\ude00"})
    answer = client.post("/v1/echo", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert answer.json()["body"] == body


@pytest.mark.parametrize("model", ["", "nobody", "poet@2", "poet@", "POET", " poet", "x" * 5000])
def test_an_unknown_name_is_404_with_openais_error(client: TestClient, model: str) -> None:
    answer = client.post("/v1/echo", json={"model": model})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model" and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


def test_made_up_names_leave_nothing_behind(client: TestClient) -> None:
    registry: Registry = client.app.state.perft_registry  # type: ignore[attr-defined]
    before = {key: len(value) for key, value in vars(registry).items() if hasattr(value, "__len__")}
    for number in range(500):
        assert client.post("/v1/echo", json={"model": f"made-up-{number}"}).status_code == 404
    assert before == {key: len(value) for key, value in vars(registry).items() if hasattr(value, "__len__")}


@pytest.mark.parametrize("body", ["", "not json", "[]", "{}", '{"model": 3}', '{"model": null}', "[" * 5000])
def test_what_is_no_request_for_a_model_is_left_to_vllm(client: TestClient, body: str) -> None:
    answer = client.post("/v1/echo", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.json()["body"] == body
