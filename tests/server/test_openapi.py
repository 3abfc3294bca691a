"""The OpenAPI document of our routes is kept: requests made from it, right and wrong ones, are answered as it says."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import positive_data_acceptance

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.synthetic import write_adapter

FOLDER = TemporaryDirectory()
ENGINE = FakeEngine()
APP = build_app(settings_of(Path(FOLDER.name) / "store", adapter_sources=(FOLDER.name,)), ENGINE)
schema = schemathesis.openapi.from_dict(APP.openapi())
schema.app = APP
THERE: dict[str, Any] = {"name": "poet", "version": 1, "file": "weights", "model": "poet"}


def form(name: str, seed: int) -> dict[str, Any]:
    folder = write_adapter(Path(FOLDER.name) / f"given-{seed}", BASE, seed)
    files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    return {"body": {"name": name, "activate": "true", **files}, "media_type": "multipart/form-data"}


EXAMPLES: dict[str, dict[str, Any]] = {
    "POST /v1/adapters": form("clerk", 2),
    "POST /v1/load_lora_adapter": {
        "body": {"lora_name": "clerk", "lora_path": f"{FOLDER.name}/given-2"}, "media_type": "application/json",
    },
    "POST /v1/unload_lora_adapter": {"body": {"lora_name": "clerk"}, "media_type": "application/json"},
    "PATCH /v1/adapters/{name}": {"body": {"pinned": True, "allowed_keys": None}, "media_type": "application/json"},
}  # fmt: skip


def test_the_document_says_what_the_server_is_and_how_it_takes_a_key() -> None:
    document = APP.openapi()
    assert document["info"]["title"] == "perft-server" and document["info"]["version"] == version("perft-server")
    schemes = document["components"]["securitySchemes"]
    assert schemes["key"] == {"type": "http", "scheme": "bearer", "description": "an API key or the admin key"}
    assert schemes["x-api-key"] == {"type": "apiKey", "in": "header", "name": "x-api-key"}
    operation = document["paths"]["/v1/adapters/{name}"]["get"]
    assert operation["security"] == [{"key": []}, {"x-api-key": []}], "one of them is enough"
    assert "422" not in operation["responses"]


@pytest.fixture(autouse=True)
def poet() -> Iterator[None]:
    """A name with two versions, so that requests meet something that is there."""
    for seed in range(2):
        answer = schema["/v1/adapters"]["POST"].Case(**form("poet", seed)).call(headers=bearer())
        assert answer.status_code in (200, 201), (answer.text, ENGINE.broken_rules)
        THERE["version"] = min(version["version"] for version in answer.json()["versions"])
    yield
    assert not ENGINE.broken_rules


@schema.hook
def before_add_examples(context: Any, examples: list[Any]) -> None:
    operation = context.operation
    path = {name: value for name, value in THERE.items() if f"{{{name}}}" in operation.path}
    examples.append(operation.Case(path_parameters=path, **EXAMPLES.get(operation.label, {})))


@schema.parametrize()
@hypothesis.settings(
    max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
)
def test_every_answer_is_as_documented(case: schemathesis.Case) -> None:
    aim(case)
    case.call_and_validate(
        headers=bearer(), excluded_checks=[positive_data_acceptance] if says_too_little(case) else []
    )


def says_too_little(case: schemathesis.Case) -> bool:
    """Whether what fits its schema may still be refused: random bytes are no adapter, 2.0 is no version, a made-up
    label is no key's, and `after` is for a list by name alone."""
    query = case.query or {}
    if "after" in query and (query.get("offset") or query.get("sort", "name") != "name"):
        return True
    body = case.body if isinstance(case.body, dict) else {}
    return case.method == "POST" or bool(body.get("allowed_keys")) or any(isinstance(v, float) for v in body.values())


def aim(case: schemathesis.Case) -> None:
    """Point most requests with a sound path at what is there, and leave some of them to what is not."""
    path = case.meta and case.meta.components.get(ParameterLocation.PATH)
    if path and path.mode.is_positive and sum(map(ord, str(case.path_parameters))) % 3:
        case.path_parameters = {key: THERE[key] for key in case.path_parameters}
