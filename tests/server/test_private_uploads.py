"""`allowed_keys` with an upload: an adapter is private from its first moment, and a name does not become public again
by being deleted."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.errors import AdapterUnavailableError, ModelNotFoundError
from tests.server.desk import ADMIN, ALICE, BOB, Desk, on_a_loop, opened
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import FakeEngine
from tests.server.uploads import Upload, uploader


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = build_app(settings_of(tmp_path / "store"), FakeEngine())
    with TestClient(app, raise_server_exceptions=False, headers=bearer()) as client:
        yield client


@pytest.fixture
def upload(client: TestClient, tmp_path: Path) -> Upload:
    return uploader(client, tmp_path)


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ('["alice"]', ["alice"]),
        ('["alice", "bob"]', ["alice", "bob"]),
        (' [ "bob" ] \n', ["bob"]),
        ("alice", ["alice"]),
        ("alice, bob", ["alice", "bob"]),
        ("[]", []),
        (" null\n", None),
        ("null", None),
    ],
)
def test_an_upload_sets_who_may_use_the_adapter(
    client: TestClient, upload: Upload, given: str, keys: list[str] | None
) -> None:
    answer = upload("poet", 0, allowed_keys=given)
    assert answer.status_code == 201 and answer.json()["allowed_keys"] == keys
    assert client.get("/v1/adapters/poet").json()["allowed_keys"] == keys
    for label in ("alice", "bob"):
        status = client.get("/v1/models/poet", headers=bearer(label)).status_code
        assert status == (200 if keys is None or label in keys else 404)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("", "allowed_keys"),
        (" \n", "allowed_keys"),
        ("[", "allowed_keys"),
        ("[" * 60_000, "allowed_keys"),
        ('["alice"', "allowed_keys"),
        ("x" * 200_000, "allowed_keys"),
        ("carol", "allowed_keys"),
        ('["alice", "carol"]', "allowed_keys"),
        ('["admin"]', "allowed_keys"),
        ("alice,,bob", "allowed_keys.1"),
        ("true false", "allowed_keys.0"),
        ('["alice", 5]', "allowed_keys.1"),
        ('["alice", null]', "allowed_keys.1"),
        ('["a b"]', "allowed_keys.0"),
        ('["\\ud800"]', "allowed_keys.0"),
        ('"alice"', "allowed_keys.0"),
        (json.dumps(["alice"] * 1001), "allowed_keys"),
    ],
)
def test_what_is_no_list_of_labels_is_refused_and_nothing_is_stored(
    client: TestClient, upload: Upload, given: str, param: str
) -> None:
    answer = upload("poet", 0, allowed_keys=given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param), error
    assert client.get("/v1/adapters").json()["data"] == []


def test_nothing_as_the_labels_opens_no_adapter_and_the_answer_says_what_to_send(
    client: TestClient, upload: Upload
) -> None:
    """What a script sends whose variable is not set."""
    upload("poet", 0, allowed_keys="alice")
    error = upload("poet", 1, allowed_keys="").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "allowed_keys")
    for part in ("found nothing", "null for every key", "[] for the admin key", '["alice"]', "leave the field out"):
        assert part in error["message"], error["message"]
    assert client.get("/v1/adapters/poet").json()["allowed_keys"] == ["alice"]


def test_the_location_is_the_version_of_the_content(client: TestClient, upload: Upload) -> None:
    """Whichever is active, and whichever was there."""
    for seed, number, status in ((0, 1, 201), (1, 2, 201), (0, 1, 200), (1, 2, 200)):
        answer = upload("poet", seed, activate="false")
        assert answer.status_code == status and answer.headers["location"] == f"/v1/adapters/poet/versions/{number}"
        found = client.get(answer.headers["location"]).json()
        assert found["version"] == number and answer.json()["active"] is None


def test_a_label_whose_key_is_gone_may_stay(client: TestClient, upload: Upload) -> None:
    upload("poet", 0)
    registry: Any = client.app.state.services.registry  # type: ignore[attr-defined]
    registry._records["poet"] = registry._records["poet"].changed(allowed_keys=("retired",))
    assert upload("poet", 1, allowed_keys='["retired", "bob"]').json()["allowed_keys"] == ["retired", "bob"]
    assert upload("clerk", 2, allowed_keys='["retired"]').status_code == 400


def test_a_key_sees_of_the_others_neither_labels_nor_use(client: TestClient, upload: Upload) -> None:
    upload("both", 0, allowed_keys="alice,bob")
    upload("open", 1)
    upload("own", 2, allowed_keys="alice")
    for model in ("both", "open", "own"):
        client.post("/v1/completions", json={"model": model}, headers=bearer("alice"))
    paths = ["/v1/adapters", *(f"/v1/adapters/{name}" for name in ("both", "open", "own"))]
    for label in ("alice", "bob", "admin"):
        found: dict[str, Any] = {}
        for path in paths:
            answer = client.get(path, headers=bearer(label))
            for adapter in answer.json().get("data", [answer.json()]) if answer.status_code == 200 else ():
                assert found.setdefault(adapter["name"], adapter) == adapter, "in lists and alone alike"
        keys = {name: adapter["allowed_keys"] for name, adapter in found.items()}
        used = {name: adapter["versions"][0]["last_used"] is not None for name, adapter in found.items()}
        if label == "admin":
            assert keys == {"both": ["alice", "bob"], "open": None, "own": ["alice"]} and all(used.values())
        else:
            own = {"own": True} if label == "alice" else {}
            assert used == {"both": False, "open": False} | own
            assert keys == {"both": [label], "open": None} | {name: ["alice"] for name in own}
        for name, adapter in found.items():
            version = client.get(f"/v1/adapters/{name}/versions/1", headers=bearer(label)).json()
            assert version == adapter["versions"][0]


# At the service


def keys_of(desk: Desk, name: str) -> list[str] | None:
    return desk.registry.adapter(name, ADMIN).allowed_keys


@on_a_loop
async def test_nobody_else_sees_a_private_adapter_at_any_moment(folder: Path) -> None:
    """Looked at before and after every step of the disk and of the engine."""
    async with opened(folder, FakeEngine(delays={"prepare": 0.1, "place": 0.1})) as desk:
        seen: list[str] = []

        def look(*_: object) -> None:
            for record in desk.store.adapters():
                if record.allowed_keys != ("alice",):
                    seen.append(f"{record}")
            for model in ("poet", "poet@1", "poet@2"):
                try:
                    desk.registry.resolve(model, BOB)
                except ModelNotFoundError:
                    continue
                seen.append(model)

        desk.disk.step = look  # type: ignore[method-assign]
        desk.audit.on_record = look
        for seed in (1, 2):
            change = asyncio.create_task(desk.upload("poet", seed, allowed_keys=["alice"]))
            while not change.done():
                look()
                await asyncio.sleep(0.001)
            assert (await change)[0].allowed_keys == ["alice"]
        assert desk.found("poet", ALICE).number == 2 and not seen
        assert desk.audit.records[0][1] == {
            "name": "poet", "digest": desk.found("poet@1").record.digest, "activate": True, "allowed_keys": ["alice"],
        }  # fmt: skip


@on_a_loop
async def test_opening_a_name_with_a_new_version_opens_no_older_one(folder: Path) -> None:
    """Also if the new one cannot be loaded; restricting a name is immediate."""
    async with opened(
        folder, FakeEngine(delays={"prepare": 0.1}, failures=Counter({("prepare", "poet@2"): 1}))
    ) as desk:
        await desk.upload("poet", 1, allowed_keys=["alice"])
        for keys in (None, ["alice", "bob"]):
            seen = []
            change = asyncio.create_task(desk.upload("poet", 2, allowed_keys=keys))
            while not change.done():
                with suppress(ModelNotFoundError):
                    seen.append(desk.registry.resolve("poet", BOB))
                await asyncio.sleep(0.001)
            assert all(version is not None and version.number > 1 for version in seen)
            if keys is None:
                with pytest.raises(AdapterUnavailableError):
                    await change
                assert keys_of(desk, "poet") == ["alice"]
        assert (await change)[0].allowed_keys == ["alice", "bob"] and desk.found("poet", BOB).number == 3


@on_a_loop
async def test_a_deleted_private_name_comes_back_as_private(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1, allowed_keys=["alice"])
        async with desk.request("poet"):
            await desk.service.delete("poet", None, ADMIN)
            adapter, _ = await desk.upload("poet", 2)
            assert adapter.allowed_keys == ["alice"], "while the old one drains"
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
    async with opened(folder) as desk:
        adapter, _ = await desk.upload("poet", 1)
        assert adapter.allowed_keys == ["alice"] and adapter.active == 3, "after a restart too"
        with pytest.raises(ModelNotFoundError):
            desk.registry.resolve("poet", BOB)
        assert (await desk.upload("other", 1))[0].allowed_keys is None, "another name, of the same content, is open"
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
        assert (await desk.upload("poet", 1, allowed_keys=None))[0].allowed_keys is None
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
        assert (await desk.upload("poet", 1))[0].allowed_keys is None, "it was open when it was deleted"


@on_a_loop
async def test_an_upload_without_keys_leaves_them_and_one_with_keys_sets_them(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1, allowed_keys=["alice"])
        assert (await desk.upload("poet", 2))[0].allowed_keys == ["alice"]
        assert (await desk.upload("poet", 3, allowed_keys=["bob"]))[0].allowed_keys == ["bob"]
        adapter, created = await desk.upload("poet", 1, allowed_keys=["alice", "bob"], activate=False)
        assert not created and (adapter.allowed_keys, adapter.active) == (["alice", "bob"], 3)
        adapter, created = await desk.upload("poet", 1, allowed_keys=[])
        assert not created and (adapter.allowed_keys, adapter.active) == ([], 1)


@on_a_loop
async def test_an_upload_that_fails_changes_no_keys(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine) as desk:
        await desk.upload("poet", 1, allowed_keys=["alice"])
        await desk.upload("poet", 2, activate=False)
        for keys in (["bob"], None):
            engine.failures["prepare", "poet@3"] = engine.failures["prepare", "poet@4"] = 1
            with pytest.raises(AdapterUnavailableError):
                await desk.upload("poet", 3, allowed_keys=keys)
            assert keys_of(desk, "poet") == ["alice"] and desk.found("poet").number == 1
        engine.failures["prepare", "poet@2"] = 1
        with pytest.raises(AdapterUnavailableError):
            await desk.upload("poet", 2, allowed_keys=None)
        assert keys_of(desk, "poet") == ["alice"] and desk.found("poet").number == 1
        engine.failures["prepare", "new@1"] = 1
        with pytest.raises(AdapterUnavailableError):
            await desk.upload("new", 4, allowed_keys=["alice"])
        await desk.until_gone("new")
        adapter, _ = await desk.upload("new", 4)
        assert adapter.allowed_keys == ["alice"] and adapter.active == 2
