"""The adapter routes on the wire: status, schema, code, headers of every answer, over a store and the fake engine."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from adapters.errors import StorageFullError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, Limits
from adapters.ref import AdapterRef
from server.api.adapters import reading
from server.api.dependencies import Services
from server.api.error_responses import ApiError
from server.api.models import ModelList
from server.api.schemas import AdapterList, AdapterObject, ErrorObject, UploadedAdapter, VersionObject
from server.app import monitor
from server.auth.keys import Caller
from server.engine.protocol import EngineCounters
from server.errors import EngineUnavailableError, QuotaExceededError, ServerError
from server.registry.listing import page as listing
from server.registry.registry import Registry
from server.registry.version import AdapterView
from server.sharing.once import MOST_KEPT
from server.uploads.validate import UploadValidator
from tests.hostile import good
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.server.uploads import Upload, uploader
from tests.synthetic import write_adapter

BOB = bearer("bob")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    assert not engine.broken_rules


@pytest.fixture
def client(tmp_path: Path, engine: FakeEngine) -> Iterator[TestClient]:
    app = build_app(settings_of(tmp_path / "store"), engine)
    with TestClient(app, raise_server_exceptions=False, headers=bearer()) as client:
        yield client


@pytest.fixture
def services(client: TestClient) -> Services:
    app = client.app
    assert isinstance(app, FastAPI)
    services: Services = app.state.services
    return services


@pytest.fixture
def staged(services: Services) -> list[Path]:
    """The folders that uploads were staged in."""
    folders: list[Path] = []
    stage = services.adapters.stage

    def keep() -> Path:
        folders.append(stage())
        return folders[-1]

    services.adapters.stage = keep  # type: ignore[method-assign]
    return folders


@pytest.fixture
def upload(client: TestClient, tmp_path: Path) -> Upload:
    return uploader(client, tmp_path)


def refused(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of a refusal, which must be OpenAI's error object with this status and code."""
    assert answer.status_code == status, answer.text
    error = ErrorObject.model_validate(answer.json()).error
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert (error.code, error.type, error.param) == (code, kind, param), error
    return error.message


def test_upload_answers_201_then_200_for_the_same_content(upload: Upload, staged: list[Path]) -> None:
    first, again, second = upload("poet", 0), upload("poet", 0), upload("poet", 1, activate="false")
    assert [answer.status_code for answer in (first, again, second)] == [201, 200, 201]
    at = [answer.headers["location"].removeprefix("/v1/adapters/poet/versions/") for answer in (first, again, second)]
    assert at == ["1", "1", "2"]
    adapter = AdapterObject.model_validate(second.json())
    assert adapter.active == 1 and [version.id for version in adapter.versions] == ["poet@1", "poet@2"]
    assert adapter.versions[0].variant == "R" and adapter.versions[0].state == "ready"
    assert len(staged) == 3 and not any(folder.exists() for folder in staged)


def test_what_was_staged_is_gone_after_a_refused_upload(client: TestClient, staged: list[Path]) -> None:
    files = {"config": (CONFIG_FILE, b"{}"), "weights": (WEIGHTS_FILE, b"")}
    answer = client.post("/v1/adapters", data={"name": "poet"}, files=files)
    refused(answer, 400, "invalid_adapter")
    assert "variant: missing" in answer.json()["error"]["violations"]
    assert len(staged) == 1 and not staged[0].exists()
    assert client.get("/v1/adapters").json()["data"] == []


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "multipart/form-data", None])
def test_an_upload_that_is_no_multipart_is_refused(
    client: TestClient, staged: list[Path], content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = client.post("/v1/adapters", content=b'{"name": "poet"}', headers=headers)
    assert answer.status_code == 400 and ErrorObject.model_validate(answer.json())
    assert not any(folder.exists() for folder in staged)


def test_lists_come_in_pages(client: TestClient, upload: Upload) -> None:
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        upload(name, 0)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = AdapterList.model_validate(client.get("/v1/adapters", params=query).json())
        seen += [adapter.name for adapter in page.data]
        assert len(page.data) <= 2 and page.has_more == (page.next is not None)
        if page.next is None:
            break
        query["after"] = page.next
    assert seen == names
    exact = client.get("/v1/adapters", params={"limit": 5}).json()
    assert len(exact["data"]) == 5 and not exact["has_more"] and exact["next"] is None
    assert client.get("/v1/adapters", params={"after": "e"}).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"after": "../x"}, "after"),
        ({"before": "x"}, "before"),
        ({"offset": -1}, "offset"),
        ({"sort": "size"}, "sort"),
        ({"sort": "--rows"}, "sort"),
        ({"resident": "moon"}, "resident"),
        ({"versions": "none"}, "versions"),
        ({"search": "x" * 201}, "search"),
        ({"after": "a", "offset": 1}, "after"),
        ({"after": "a", "sort": "rows"}, "after"),
        ({"after": "a", "sort": "-name"}, "after"),
    ],
)
def test_a_bad_page_names_the_parameter(client: TestClient, query: dict[str, Any], param: str) -> None:
    assert param in refused(client.get("/v1/adapters", params=query), 400, "invalid_request", param)


def test_a_page_costs_what_it_shows(client: TestClient, upload: Upload, services: Services) -> None:
    for name in "abcde":
        upload(name, 0)
    built: list[str] = []
    build = services.registry.view

    def watched(name: str, caller: Caller, active_only: bool = False) -> AdapterView:
        built.append(name)
        return build(name, caller, active_only)

    services.registry.view = watched  # type: ignore[method-assign]
    page = client.get("/v1/adapters", params={"limit": 2, "after": "b"}).json()
    assert [adapter["name"] for adapter in page["data"]] == ["c", "d"] and page["next"] == "d"
    page = client.get("/v1/adapters", params={"limit": 2, "sort": "-rows", "offset": 1}).json()
    assert [adapter["name"] for adapter in page["data"]] == ["b", "c"] and page["total"] == 5
    assert len(built) <= 6


def listed(client: TestClient, key: str = "admin", **query: Any) -> list[str]:
    answer = client.get("/v1/adapters", params=query, headers=bearer(key))
    page = AdapterList.model_validate(answer.json())
    assert page.total >= len(page.data) and page.has_more == (page.total > len(page.data) + query.get("offset", 0))
    return [adapter.name for adapter in page.data]


@pytest.fixture
def several(client: TestClient, upload: Upload, services: Services) -> Services:
    """Six names: b@2 is newest and not active, d has no active version; use and creation are made up."""
    for seed, name in enumerate("abcdef"):
        upload(name, seed, activate="false" if name == "d" else "true", config={"bottleneck": 4} if name == "c" else {})
    upload("b", 9, activate="false")
    for order, (name, running, used) in enumerate(
        [("a", 2, 50), ("b", 0, 70), ("c", 2, None), ("e", 5, 60), ("f", 0, None)]
    ):
        version = services.registry.active(name)
        assert version is not None
        version.requests_running, version.last_used = running, used
        version.record = version.record.model_copy(update={"created": 1000 - order})
    for version in services.registry.versions("d"):
        version.requests_running, version.last_used = 99, 99
    return services


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("name", "abcdef"),
        ("-name", "fedcba"),
        ("running", "bfaced"),
        ("-running", "eacbfd"),
        ("last_used", "aebcfd"),
        ("-last_used", "beacfd"),
        ("created", "fecbad"),
        ("-created", "abcefd"),
        ("rows", "cabefd"),
        ("-rows", "abefcd"),
    ],
)
def test_a_list_is_in_the_order_asked_for(client: TestClient, several: Services, sort: str, expected: str) -> None:
    """Those of the same value by name, then those without a value, then those without an active version."""
    assert "".join(listed(client, sort=sort)) == expected
    for offset in range(7):
        assert "".join(listed(client, sort=sort, offset=offset, limit=2)) == expected[offset : offset + 2]
    answer = client.get("/v1/adapters", params={"sort": sort, "limit": 2}).json()
    assert answer["next"] == ("b" if sort == "name" else None) and answer["total"] == 6


def test_the_order_tells_no_key_what_it_may_not_see(client: TestClient, several: Services) -> None:
    """Of an adapter that alice shares she sees neither use nor requests, so they do not move it either."""
    client.patch("/v1/adapters/f", json={"allowed_keys": ["alice"]})
    client.patch("/v1/adapters/b", json={"allowed_keys": ["alice"]})
    client.patch("/v1/adapters/e", json={"allowed_keys": ["alice", "bob"]})
    for sort in ("running", "-running"):
        assert listed(client, "alice", sort=sort) == ["b", "f", "a", "c", "e", "d"]
        assert listed(client, "bob", sort=sort) == ["a", "c", "e", "d"]
    for sort in ("last_used", "-last_used"):
        assert listed(client, "alice", sort=sort) == ["b", "a", "c", "e", "f", "d"]
    assert listed(client, "admin", sort="-running") == ["e", "a", "c", "b", "f", "d"]


def test_a_list_of_what_matches(client: TestClient, upload: Upload, services: Services) -> None:
    (
        upload("poet", 0, config={"description": "Verse in the style of ÉMILE"}),
        upload("clerk", 1, config={"description": "letters"}),
    )
    upload("poet-2", 2), upload("hidden", 3, config={"description": "verse too"})
    client.patch("/v1/adapters/hidden", json={"allowed_keys": []})
    assert listed(client, search="POET") == ["poet", "poet-2"]
    assert listed(client, search="émile") == ["poet"] and listed(client, search="t\nv") == []
    assert listed(client, search="verse") == ["hidden", "poet"] and listed(client, "bob", search="verse") == ["poet"]
    assert listed(client, search="") == listed(client) and listed(client, search="\0") == []
    page = client.get("/v1/adapters", params={"search": "poet", "limit": 1}).json()
    assert (page["total"], page["has_more"], page["next"]) == (2, True, "poet")
    after = client.get("/v1/adapters", params={"search": "poet", "limit": 1, "after": "poet"}).json()
    assert [a["name"] for a in after["data"]] == ["poet-2"] and (after["total"], after["has_more"]) == (2, False)
    upload("poet", 4, config={"description": "prose"}, activate="false")
    assert listed(client, search="prose") == [], "of the active version alone"
    client.patch("/v1/adapters/poet", json={"active": 2})
    assert listed(client, search="prose") == ["poet"] and listed(client, search="émile") == []


def test_a_list_of_what_is_somewhere(client: TestClient, several: Services) -> None:
    tiers = {a["name"]: {v["version"]: v["resident"] for v in a["versions"]}.get(a["active"]) for a in
             client.get("/v1/adapters").json()["data"]}  # fmt: skip
    client.patch("/v1/adapters/a", json={"pinned": True})
    tiers["a"] = "device"
    for tier in ("device", "host", "disk"):
        assert listed(client, resident=tier) == [name for name in "abcdef" if tiers[name] == tier]
    assert listed(client, resident="device", search="b") == []


def test_a_list_may_have_the_active_versions_alone(client: TestClient, several: Services) -> None:
    data = client.get("/v1/adapters", params={"versions": "active"}).json()["data"]
    assert {a["name"]: [v["version"] for v in a["versions"]] for a in data} == {name: [1] for name in "abcdef"}
    assert [a["active"] for a in data if a["name"] == "d"] == [None]
    assert client.get("/v1/adapters/b").json()["active"] == 1
    whole = client.get("/v1/adapters", params={"versions": "all"}).json()
    assert whole == client.get("/v1/adapters").json() and len(whole["data"][1]["versions"]) == 2
    client.patch("/v1/adapters/b", json={"active": None})
    (b,) = client.get("/v1/adapters", params={"versions": "active", "search": "b"}).json()["data"]
    assert [v["version"] for v in b["versions"]] == [2], "the newest where none is active"


def test_a_page_ends_before_it_has_too_many_versions(
    client: TestClient, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MOST_VERSIONS", 3)
    for name, versions in {"a": 1, "b": 4, "c": 2, "d": 1, "e": 1}.items():
        for seed in range(versions):
            upload(name, seed)
    pages: list[list[str]] = []
    after: str | None = ""
    while after is not None:
        page = client.get("/v1/adapters", params={"after": after} if after else {}).json()
        pages.append([adapter["name"] for adapter in page["data"]])
        assert page["total"] == 5 and page["has_more"] == (page["next"] is not None)
        after = page["next"]
    assert pages == [["a"], ["b"], ["c", "d"], ["e"]]
    assert listed(client, versions="active") == ["a", "b", "c"]


def test_adapters_may_go_while_a_list_is_made(
    client: TestClient, upload: Upload, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "STEP_S", 0.0)
    names = [f"a-{number:02}" for number in range(40)]
    for name in names:
        upload(name, 0)
    work = listing.list_adapters(services.registry, Caller("admin", True), listing.ListQuery(search="a-"))
    for step in range(50):
        if step < len(names):
            client.delete(f"/v1/adapters/{names[-1 - step]}")
            wait_until_gone(client, f"/v1/adapters/{names[-1 - step]}")
        try:
            next(work)
        except StopIteration as done:
            page: listing.ListPage = done.value
            break
    else:
        raise AssertionError("the list has no end")
    assert step > 10 and 10 < len(page.data) < 40
    assert [adapter.name for adapter in page.data] == names[: len(page.data)]


def test_the_list_follows_every_change(client: TestClient, upload: Upload, services: Services) -> None:
    for name in ("c", "a", "b"):
        upload(name, 0)
    assert listed(client) == services.registry.names() == ["a", "b", "c"]
    client.delete("/v1/adapters/b")
    wait_until_gone(client, "/v1/adapters/b")
    assert listed(client) == ["a", "c"] and listed(client, sort="-rows") == ["a", "c"]
    upload("b", 1)
    assert listed(client) == ["a", "b", "c"] and services.registry.active("b") is services.registry.by_id("b@2")


def test_many_who_ask_for_one_list_get_one_answer(
    client: TestClient, upload: Upload, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a second, and until anything changes; what one may see another does not get."""
    upload("poet", 0), upload("clerk", 1)
    now, made = [100.0], list[str | None]()
    monkeypatch.setattr(services.lists, "_clock", lambda: now[0])
    make = listing.list_adapters

    def counted(registry: Registry, caller: Caller, query: listing.ListQuery) -> Any:
        made.append(caller.label)
        return make(registry, caller, query)

    monkeypatch.setattr(reading, "list_adapters", counted)
    assert [listed(client) for _ in range(5)] == 5 * [["clerk", "poet"]] and made == ["admin"]
    assert listed(client, "bob") == ["clerk", "poet"] and listed(client, sort="-name") == ["poet", "clerk"]
    assert made == ["admin", "bob", "admin"]
    client.patch("/v1/adapters/poet", json={"allowed_keys": []})
    assert listed(client, "bob") == ["clerk"] and listed(client) == ["clerk", "poet"] and len(made) == 5
    services.registry.versions("clerk")[0].requests_running = 3
    assert listed(client, sort="-running") == ["clerk", "poet"] and listed(client) == ["clerk", "poet"]
    assert client.get("/v1/adapters").json()["data"][0]["versions"][0]["requests_running"] == 0
    now[0] += 1.0
    assert client.get("/v1/adapters").json()["data"][0]["versions"][0]["requests_running"] == 3
    for offset in range(200):
        listed(client, offset=offset)
    assert len(services.lists._latest) == MOST_KEPT


def test_one_adapter_and_one_version(client: TestClient, upload: Upload) -> None:
    uploaded = upload("poet", 0).json()
    assert client.get("/v1/adapters/poet").json() == uploaded
    version = VersionObject.model_validate(client.get("/v1/adapters/poet/versions/1").json())
    assert version.model_dump() == uploaded["versions"][0]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("name", ["nobody", "Poet", "-x", "a" * 64, "%00", "a%0a", "%ff", "poet@1", "%2e%2e"])
def test_a_name_that_is_not_there_is_404(client: TestClient, upload: Upload, method: str, name: str) -> None:
    upload("poet", 0)
    body = {"pinned": True} if method == "PATCH" else None
    answer = client.request(method, f"/v1/adapters/{name}", json=body)
    refused(answer, 404, "adapter_not_found", "name" if name == "nobody" else None)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("version", ["2", "0", "-1", "01", "1.0", "+1", "%201", "x", "2147483648", "9" * 5000, "1_0"])
def test_a_version_that_is_not_there_is_404(client: TestClient, upload: Upload, method: str, version: str) -> None:
    upload("poet", 0)
    answer = client.request(method, f"/v1/adapters/poet/versions/{version}")
    message = refused(answer, 404, "version_not_found", "version" if version == "2" else None)
    assert len(message) < 300


def test_the_files_come_back_as_they_were_uploaded(client: TestClient, upload: Upload, tmp_path: Path) -> None:
    digest = upload("poet", 0).json()["versions"][0]["digest"]
    for which, file, media_type in [
        ("config", CONFIG_FILE, "application/json"),
        ("weights", WEIGHTS_FILE, "application/octet-stream"),
    ]:
        answer = client.get(f"/v1/adapters/poet/versions/1/files/{which}", headers={"Range": "bytes=1-2"})
        original = (tmp_path / "given-0" / file).read_bytes()
        assert answer.status_code == 200 and answer.content == original
        assert answer.headers["etag"] == f'"{digest}"' and answer.headers["content-type"] == media_type
        assert answer.headers["content-length"] == str(len(original))
        assert answer.headers["content-disposition"] == f'attachment; filename="{file}"'
    refused(client.get("/v1/adapters/poet/versions/1/files/README.md"), 404, "not_found")
    refused(client.get("/v1/adapters/poet/versions/2/files/config"), 404, "version_not_found", "version")


def test_a_head_of_a_file_has_its_headers_and_reads_nothing(
    client: TestClient, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload("poet", 0)
    for which in ("config", "weights"):
        path = f"/v1/adapters/poet/versions/1/files/{which}"
        expected = client.get(path).headers
        with monkeypatch.context() as without_files:
            without_files.setattr("starlette.responses.anyio.open_file", None)
            answer = client.head(path)
        assert answer.status_code == 200 and answer.content == b""
        for name in ("etag", "content-length", "content-type", "content-disposition"):
            assert answer.headers[name] == expected[name], name


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("which", ["config", "weights"])
def test_a_file_that_the_client_has_is_not_sent_again(
    client: TestClient, upload: Upload, method: str, which: str
) -> None:
    digest = upload("poet", 0).json()["versions"][0]["digest"]
    path = f"/v1/adapters/poet/versions/1/files/{which}"
    for given in (f'"{digest}"', f'W/"{digest}"', f'"other", "{digest}"', "*"):
        answer = client.request(method, path, headers={"If-None-Match": given})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", f'"{digest}"')
    for given in ('"other"', digest, f'"{digest}x"', ""):
        assert client.request(method, path, headers={"If-None-Match": given}).status_code == 200


def test_a_file_deleted_meanwhile_is_404(client: TestClient, upload: Upload, services: Services) -> None:
    upload("poet", 0)
    services.registry.weights_file = Mock(return_value=Path("/nowhere/at/all"))  # type: ignore[method-assign]
    refused(client.get("/v1/adapters/poet/versions/1/files/weights"), 404, "version_not_found", "version")


def test_a_rollback_is_a_patch_with_an_optional_compare(client: TestClient, upload: Upload) -> None:
    upload("poet", 0), upload("poet", 1)
    assert client.patch("/v1/adapters/poet", json={"active": 1, "if_active": 2}).json()["active"] == 1
    again = client.patch("/v1/adapters/poet", json={"active": 1, "if_active": 2})
    refused(again, 409, "active_changed", "if_active")
    refused(client.patch("/v1/adapters/poet", json={"active": 3}), 404, "version_not_found", "active")
    assert client.patch("/v1/adapters/poet", json={"active": None}).json()["active"] is None
    assert client.patch("/v1/adapters/poet", json={"active": 2, "if_active": None}).json()["active"] == 2


def test_a_patch_changes_only_what_it_names(client: TestClient, upload: Upload) -> None:
    upload("poet", 0)
    changed = client.patch("/v1/adapters/poet", json={"allowed_keys": ["bob"], "pinned": True}).json()
    assert (changed["allowed_keys"], changed["pinned"], changed["active"]) == (["bob"], True, 1)
    changed = client.patch("/v1/adapters/poet", json={"allowed_keys": None}).json()
    assert (changed["allowed_keys"], changed["pinned"], changed["active"]) == (None, True, 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("{}", None),
        ('{"if_active": 1}', "if_active"),
        ('{"active": "1"}', "active"),
        ('{"active": 0}', "active"),
        ('{"active": true}', "active"),
        ('{"pinned": null}', "pinned"),
        ('{"allowed_keys": "bob"}', "allowed_keys"),
        ('{"allowed_keys": ["\\ud800"]}', "allowed_keys.0"),
        ('{"allowed_keys": ["not a label"]}', "allowed_keys.0"),
        ('{"activ": 1}', "activ"),
        ('{"\\ud800": 1}', None),
        ("[]", None),
        ("null", None),
        ("", None),
        ("{", None),
        ("[" * 100_000, None),
        ('{"active": 1, "active": 1}', "active"),
        ('{"pinned": true, "pinned": false}', "pinned"),
        ('{"allowed_keys": [], "allow\\u0065d_keys": null}', "allowed_keys"),
        ('{"x": {"\\ud800": 1, "\\ud800": 2}}', "\\ud800"),
    ],
)
def test_a_bad_patch_names_what_is_wrong_and_changes_nothing(
    client: TestClient, upload: Upload, body: str, param: str | None
) -> None:
    before = upload("poet", 0).json()
    answer = client.patch("/v1/adapters/poet", content=body, headers={"content-type": "application/json"})
    assert len(refused(answer, 400, "invalid_request", param)) < 500
    assert client.get("/v1/adapters/poet").json() == before


@pytest.mark.parametrize("body", [json.dumps({"allowed_keys": ["x" * 300_000]}), "[" * 300_000, " " * 2**20])
def test_a_patch_over_the_limit_is_too_large(client: TestClient, upload: Upload, body: str) -> None:
    upload("poet", 0)
    answer = client.patch("/v1/adapters/poet", content=body, headers={"content-type": "application/json"})
    refused(answer, 413, "request_too_large")
    assert answer.headers["connection"] == "close"


def test_a_quota_names_no_time_to_wait(tmp_path: Path, engine: FakeEngine) -> None:
    """Waiting does not help: something has to be deleted."""
    app = build_app(settings_of(tmp_path / "store", max_versions=1), engine)
    with TestClient(app, headers=bearer()) as client:
        raws = [zipped(write_adapter(tmp_path / f"a{seed}", BASE, seed)) for seed in range(2)]
        answers = [client.post("/v1/adapters", data={"name": "poet"}, files={"file": ("a.zip", raw)}) for raw in raws]
    assert answers[0].status_code == 201
    refused(answers[1], 429, "quota_exceeded")
    assert "retry-after" not in answers[1].headers


def zipped(*folders: Path, **others: bytes) -> bytes:
    """A .zip of folders as a trainer leaves them."""
    members = {f"{folder.name}/{path.name}": path.read_bytes() for folder in folders for path in folder.iterdir()}
    return good.zipped(members | others)


def test_what_an_upload_left_out_is_in_the_answer(client: TestClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5", BASE, 0)
    raw = zipped(folder, **{"checkpoint-5/optimizer.pt": b"x", "checkpoint-5/runs/a": b"", "__MACOSX/._x": b""})
    first = client.post("/v1/adapters", data={"name": "poet"}, files={"file": ("a.zip", raw)})
    again = client.post("/v1/adapters", data={"name": "poet"}, files={"file": ("a.zip", raw)})
    assert [answer.status_code for answer in (first, again)] == [201, 200]
    for answer in (first, again):
        adapter = UploadedAdapter.model_validate(answer.json())
        assert [note.split(":")[0] for note in adapter.notes] == ["optimizer.pt", "runs/"]
    assert "notes" not in client.get("/v1/adapters/poet").json()
    for which, file in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
        stored = client.get(f"/v1/adapters/poet/versions/1/files/{which}").content
        assert stored == (folder / file).read_bytes()


def test_an_upload_of_which_nothing_is_left_out_has_no_notes(client: TestClient, tmp_path: Path) -> None:
    raw = zipped(write_adapter(tmp_path / "poet", BASE, 0))
    answer = client.post("/v1/adapters", data={"name": "poet"}, files={"file": ("a.zip", raw)})
    assert answer.json() == client.get("/v1/adapters/poet").json()


def test_a_byte_order_mark_is_not_stored(client: TestClient, tmp_path: Path, upload: Upload) -> None:
    upload("poet", 0)
    folder = tmp_path / "given-0"
    config, weights = (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
    files = {"config": (CONFIG_FILE, b"\xef\xbb\xbf" + config), "weights": (WEIGHTS_FILE, weights)}
    for name, status in (("poet", 200), ("marked", 201)):
        answer = client.post("/v1/adapters", data={"name": name}, files=files)
        assert answer.status_code == status, answer.text
    assert client.get("/v1/adapters/marked/versions/1/files/config").content == config
    files["config"] = (CONFIG_FILE, b"\xef\xbb\xbf" * 2 + config)
    refused(client.post("/v1/adapters", data={"name": "twice"}, files=files), 400, "invalid_adapter")


@pytest.mark.parametrize(("name", "suggested"), [("POET", "poet"), ("My Poet!", "my-poet"), ("a/b", "a-b")])
def test_a_name_that_may_not_be_comes_with_one_that_may(upload: Upload, name: str, suggested: str) -> None:
    assert f"such as '{suggested}'" in refused(upload(name, 0), 400, "invalid_name", "name")


@pytest.mark.parametrize("field", ["name", "activate", "file"])
def test_a_field_in_the_query_is_not_ignored(client: TestClient, tmp_path: Path, field: str) -> None:
    raw = zipped(write_adapter(tmp_path / "poet", BASE, 0))
    for fields in ({"name": "poet"}, {}):
        answer = client.post(f"/v1/adapters?{field}=false", data=fields, files={"file": ("a.zip", raw)})
        assert "as a query parameter" in refused(answer, 400, "invalid_request", field)
    assert client.get("/v1/adapters").json()["data"] == []


def test_the_config_loses_its_mark_for_attention_lora_too(tmp_path: Path) -> None:
    """vLLM reads that file itself, and refuses a mark."""
    folder = write_adapter(tmp_path / "a", BASE, 0)
    raw = b'{"peft_type": "LORA"}'
    (folder / CONFIG_FILE).write_bytes(b"\xef\xbb\xbf" + raw)
    seen: list[bytes] = []

    def check(folder: Path, *, values: bool = True) -> tuple[list[str], str | None]:
        seen.append((folder / CONFIG_FILE).read_bytes())
        return [], "0" * 64

    assert UploadValidator(BASE, Limits(), 1000, check).check(folder).kind == "LORA"
    assert seen == [raw]


def test_a_label_that_no_key_has_is_refused_with_those_there_are(
    client: TestClient, upload: Upload, services: Services
) -> None:
    upload("poet", 0)
    answer = client.patch("/v1/adapters/poet", json={"allowed_keys": ["alice", "alcie", "admin"]})
    message = refused(answer, 400, "invalid_request", "allowed_keys")
    assert "'admin', 'alcie'" in message and "alice, bob" in message
    assert client.get("/v1/adapters/poet").json()["allowed_keys"] is None
    services.registry._records["poet"] = services.registry._records["poet"].changed(allowed_keys=("retired",))
    answer = client.patch("/v1/adapters/poet", json={"allowed_keys": ["retired", "bob"]})
    assert answer.json()["allowed_keys"] == ["retired", "bob"], "a key may go before the adapter's list does"
    assert client.patch("/v1/adapters/poet", json={"allowed_keys": []}).json()["allowed_keys"] == []
    refused(client.patch("/v1/adapters/nobody", json={"allowed_keys": ["x"]}), 404, "adapter_not_found", "name")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "body: found nothing (an empty body, or null), expected a JSON object"),
        ('{"activ": 1}', "activ: unknown field; remove it (did you mean active?)"),
        ('{"allowed-keys": []}', "allowed-keys: unknown field; remove it (did you mean allowed_keys?)"),
        ('{"zzz": 1}', "zzz: unknown field; remove it"),
    ],
)
def test_a_bad_patch_says_what_is_meant(client: TestClient, upload: Upload, body: str, words: str) -> None:
    upload("poet", 0)
    answer = client.patch("/v1/adapters/poet", content=body, headers={"content-type": "application/json"})
    param = words.partition(":")[0] if "unknown" in words else None
    assert refused(answer, 400, "invalid_request", param).endswith(words)


def test_a_path_sent_in_place_of_an_archive_is_recognized(client: TestClient) -> None:
    answer = client.post("/v1/adapters", files={"name": (None, "poet"), "file": (None, "w/top.zip")})
    assert "without @ before it" in refused(answer, 400, "invalid_adapter")


def test_an_empty_patch_is_told_what_may_be_changed(client: TestClient, upload: Upload) -> None:
    upload("poet", 0)
    message = refused(client.patch("/v1/adapters/poet", json={}), 400, "invalid_request")
    assert all(key in message for key in ("active", "if_active", "allowed_keys", "pinned"))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "poet"),
        ("PATCH", "poet"),
        ("DELETE", "poet"),
        ("GET", "poet/versions/1"),
        ("DELETE", "poet/versions/1"),
        ("GET", "poet/versions/1/files/config"),
    ],
)
def test_a_query_that_a_route_does_not_know_is_refused_and_nothing_is_lost(
    client: TestClient, upload: Upload, method: str, path: str
) -> None:
    upload("poet", 0), upload("poet", 1)
    before = client.get("/v1/adapters/poet").json()
    body = {"json": {"pinned": True}} if method == "PATCH" else {}
    answer = client.request(method, f"/v1/adapters/{path}?version=2", **body)
    assert "query parameter 'version'" in refused(answer, 400, "invalid_request", "version")
    assert client.get("/v1/adapters/poet").json() == before


def test_delete_is_202_and_not_for_the_active_one_of_several(client: TestClient, upload: Upload) -> None:
    upload("poet", 0), upload("poet", 1)
    refused(client.delete("/v1/adapters/poet/versions/2"), 409, "version_active", "version")
    answer = client.delete("/v1/adapters/poet/versions/1")
    assert answer.status_code == 202
    assert [version.state for version in AdapterObject.model_validate(answer.json()).versions] == ["draining", "ready"]
    wait_until_gone(client, "/v1/adapters/poet/versions/1")
    assert client.delete("/v1/adapters/poet").status_code == 202
    wait_until_gone(client, "/v1/adapters/poet")
    assert upload("poet", 0).json()["active"] == 3


def wait_until_gone(client: TestClient, path: str) -> None:
    while (answer := client.get(path)).status_code == 200:
        time.sleep(0.01)
    assert answer.status_code == 404


def test_a_key_sees_only_what_it_may_use(client: TestClient, upload: Upload) -> None:
    upload("poet", 0), upload("clerk", 1)
    client.patch("/v1/adapters/poet", json={"allowed_keys": ["alice"]})
    listed = client.get("/v1/adapters", headers=BOB).json()
    assert [adapter["name"] for adapter in listed["data"]] == ["clerk"]
    for path in ("", "/versions/1"):
        refused(client.get(f"/v1/adapters/poet{path}", headers=BOB), 404, "adapter_not_found", "name")
    refused(client.get("/v1/adapters/clerk/versions/1/files/config", headers=BOB), 403, "forbidden")
    assert [card["id"] for card in client.get("/v1/models", headers=BOB).json()["data"]] == [
        "base", "org/alias", "clerk",
    ]  # fmt: skip
    refused(client.get("/v1/models/poet", headers=BOB), 404, "model_not_found", "model")


def test_models_are_the_base_and_every_servable_name(client: TestClient, upload: Upload, tmp_path: Path) -> None:
    upload("poet", 0), upload("poet", 1), upload("idle", 2, activate="false")
    listed = client.get("/v1/models")
    assert listed.headers["content-type"] == "application/json"
    assert ModelList.model_validate(listed.json()).model_dump() == listed.json()
    cards = {card["id"]: card for card in listed.json()["data"]}
    assert {name: card["parent"] for name, card in cards.items()} == {"base": None, "org/alias": None, "poet": "base"}
    created = client.get("/v1/adapters/poet/versions/2").json()["created"]
    assert cards["poet"]["created"] == created and cards["poet"]["root"] == "base"
    assert str(tmp_path) not in listed.text
    for model in ("base", "org/alias", "poet", "poet@1", "poet@2", "idle@1"):
        assert client.get(f"/v1/models/{model}").json()["id"] == model
    for path in ("/v1/models/", "//v1//models//"):
        assert client.get(f"http://127.0.0.1{path}").json() == listed.json()
    for model in ("poet/", "/poet", "org//alias/", "/org/alias"):
        assert client.get(f"/v1/models/{model}").json()["id"] in ("poet", "org/alias")
    for model in ("idle", "poet@3", "poet@", "nobody", "%2e%2e/x", "%ff"):
        refused(client.get(f"/v1/models/{model}"), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (QuotaExceededError("found 3 adapters", retry_after_s=30), 429, "quota_exceeded"),
        (EngineUnavailableError("starting", retry_after_s=1), 503, "engine_unavailable"),
        (StorageFullError("the disk is full"), 507, "storage_full"),
        (ValueError("secret words"), 500, "internal_error"),
        (HTTPException(418, "a teapot"), 418, "invalid_request"),
    ],
)
def test_every_error_leaves_in_our_form_whatever_the_app_registers(
    client: TestClient, services: Services, caplog: pytest.LogCaptureFixture, raised: Exception, status: int, code: str
) -> None:
    def fail(*_: Any) -> Any:
        raise raised

    app = client.app
    assert isinstance(app, FastAPI)
    for kind in (ApiError, ServerError, RequestValidationError, HTTPException, ValueError, Exception):
        app.add_exception_handler(kind, lambda *_: PlainTextResponse("theirs", 299))
    services.registry.adapter = fail  # type: ignore[method-assign]
    answer = client.get("/v1/adapters/poet")
    assert "secret" not in refused(answer, status, code)
    request_id = answer.headers["x-request-id"]
    assert any(request_id in record.getMessage() for record in caplog.records) == (status >= 500)
    retry_after = str(raised.retry_after_s) if isinstance(raised, ServerError) else None
    assert answer.headers.get("retry-after") == retry_after
    assert client.get("/v1/adapters?limit=0").status_code == 400


def test_downloads_leave_no_file_open(client: TestClient, upload: Upload) -> None:
    upload("poet", 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert client.get("/v1/adapters/poet/versions/1/files/weights").status_code == 200
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_download_keeps_its_file_in_a_cache_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adapter is fetched between the look at the file and its first byte."""
    settings = settings_of(
        tmp_path / "unused", adapter_store=f"file://{tmp_path / 'shared'}", adapter_cache=tmp_path / "cache",
        adapter_cache_bytes=1, store_lag_s=0.5,
    )  # fmt: skip
    with TestClient(build_app(settings, FakeEngine()), headers=bearer()) as client:
        upload = uploader(client, tmp_path)
        for seed, name in enumerate(("poet", "painter")):
            assert upload(name, seed).status_code == 201
        stat, services = os.stat, client.app.state.services  # type: ignore[attr-defined]
        weights = (tmp_path / "given-0" / WEIGHTS_FILE).read_bytes()

        def stat_and_fetch_another(path: Path) -> os.stat_result:
            found = stat(path)
            services.registry.weights_file(services.registry.by_id("painter@1"))
            return found

        monkeypatch.setattr("server.api.adapters.files.os", Mock(stat=stat_and_fetch_another))
        assert client.get("/v1/adapters/poet/versions/1/files/weights").content == weights


def test_an_upload_that_fails_unforeseen_is_counted(
    client: TestClient, upload: Upload, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("nobody expected this")

    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith('perft_uploads_total{result="error"'))

    with monkeypatch.context() as patch:
        patch.setattr("server.api.adapters.upload.receive_upload", fail)
        refused(upload("poet", 0), 500, "internal_error")
    assert counted() == 1
    services.adapters.stage = fail  # type: ignore[method-assign]
    refused(upload("poet", 0), 500, "internal_error")
    assert counted() == 2


def test_a_scrape_survives_a_delete(upload: Upload, services: Services) -> None:
    """A scrape reads on a thread of its own while the event loop changes what is there."""
    upload("clerk", 0), upload("ode", 1), upload("poet", 2)
    registry = services.registry
    tier, ode, poet = services.scheduler.tier, registry._versions["ode"].pop(1), registry._by_id["poet@1"]

    def meanwhile(adapter: AdapterRef) -> Any:
        registry._records.pop("poet", None), registry._versions.pop("poet", None)
        return tier(adapter)

    services.scheduler.tier = meanwhile  # type: ignore[method-assign]
    page = services.metrics_page.render([], "")[0].decode()
    assert 'perft_adapter_resident{adapter="clerk",tier="host"} 1.0' in page
    assert 'perft_adapter_resident{adapter="ode"' not in page
    registry.put_version(ode), registry.put_version(poet)


def test_tokens_of_experts_never_fall_while_the_name_is_there(
    client: TestClient, upload: Upload, engine: FakeEngine, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scrape asks the engine anew: no poll of the monitor's own is under way, and this one may take long."""
    monkeypatch.setattr(monitor, "ANSWER_TIMEOUT_S", 300.0)
    client.portal.call(services.metrics_page.monitor.stop)
    upload("poet", 0), upload("poet", 1)
    ids = {number: services.registry._by_id[f"poet@{number}"].ref.engine_id for number in (1, 2)}

    def seen(**counts: tuple[int, ...]) -> list[float]:
        engine.counted = EngineCounters(expert_tokens={ids[int(key[1:])]: value for key, value in counts.items()})
        lines = client.get("/metrics").text.splitlines()
        return [
            float(line.split()[-1]) for line in lines if line.startswith('perft_expert_tokens_total{adapter="poet"')
        ]

    assert seen() == []
    assert seen(v1=(5, 3)) == [5, 3]
    assert seen(v1=(6, 3), v2=(1, 0, 2)) == [7, 3, 2]
    assert seen(v1=(6, 3), v2=(1, 0, 2)) == [7, 3, 2]
    client.delete("/v1/adapters/poet/versions/1")
    wait_until_gone(client, "/v1/adapters/poet/versions/1")
    assert seen(v2=(1, 1, 2)) == [7, 4, 2]
    assert seen(v1=(9, 9), v2=(1, 1, 2)) == [7, 4, 2], "an answer that was under way"
    client.delete("/v1/adapters/poet")
    wait_until_gone(client, "/v1/adapters/poet")
    assert seen(v2=(2, 2, 2)) == []


def test_the_document_says_that_the_metrics_may_be_refused(client: TestClient) -> None:
    answers = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]
    assert set(answers) == {"200", "401", "403"}
