"""The calls of control planes, replayed as they send them; what they may load, and from where nobody may."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from adapters.store.log.bucket import Bucket
from server.sources import child
from tests.server.fake_server import bearer
from tests.server.fakes import BASE
from tests.server.hub import FILES, Hub, running_hub
from tests.server.local_server import LocalServer, local_server
from tests.server.processes import wait_until
from tests.store.places import S3_OPTIONS, s3_server
from tests.synthetic import write_adapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATIENCE_S = 600.0
Start = Callable[..., "Plane"]


class Plane:
    """A control plane's connection to a server, with the admin key."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, headers=bearer(), timeout=PATIENCE_S)

    def load(self, name: str, path: object, **more: Any) -> httpx.Response:
        return self.http.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})

    def cut_off(self, path: str) -> None:
        """A load that its server does not live to answer."""
        with suppress(httpx.HTTPError):
            self.load("poet", path)

    def unload(self, name: str) -> httpx.Response:
        return self.http.post(UNLOAD, json={"lora_name": name})

    def models(self) -> dict[str, dict[str, Any]]:
        """GET /v1/models by id, as planes look for what is loaded."""
        return {model["id"]: model for model in self.http.get("/v1/models").json()["data"]}

    def answered_by(self, model: str) -> str:
        answer = self.http.post("/v1/completions", json={"model": model, "max_tokens": 1}).raise_for_status()
        return str(answer.json()["model"])

    def refused(self, response: httpx.Response) -> tuple[int, str, str | None]:
        """Status, code and param of an error in our shape."""
        error = response.json()["error"]
        assert response.status_code >= 400 and error["message"], response.text
        return response.status_code, error["code"], error["param"]

    def sources(self) -> list[str]:
        """The places that the audit log has of uploads."""
        lines = self.server.services.settings.audit_path.read_text(encoding="utf-8").splitlines()
        return [entry["source"] for line in lines if (entry := json.loads(line))["action"] == "upload"]

    def is_tidy(self) -> bool:
        """Whether nothing is left of a load but the adapter."""
        return not list((Path(self.server.services.settings.adapter_store) / "staging").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of adapters, which tests allow; beside it is another one that they do not."""
    for name, seed in (("allowed/poet", 1), ("allowed/team/clerk", 2), ("allowed/poet-2", 3), ("allowed-evil/spy", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_adapter(tmp_path / name, BASE, seed)
    return tmp_path / "allowed"


@contextmanager
def servers(folder: Path) -> Iterator[Start]:
    """What starts servers, which end with the context."""
    with ExitStack() as running:

        def start(*sources: object, **settings: Any) -> Plane:
            return Plane(
                running.enter_context(local_server(folder, adapter_sources=tuple(map(str, sources)), **settings))
            )

        yield start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own, which the environment has the key to."""
    monkeypatch.setenv("AWS_ENDPOINT", s3_address)
    for option in ("access_key_id", "secret_access_key", "region"):
        monkeypatch.setenv(f"AWS_{option.upper()}", S3_OPTIONS[option])
    return f"s3://adapters/{uuid4().hex}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


def put(address: str, folder: Path, s3_address: str) -> str:
    """Put the files of an adapter into the bucket."""
    bucket = Bucket(address, endpoint=s3_address, **S3_OPTIONS)
    for name in FILES:
        bucket.put_file(name, folder / name)
    return address


# Off unless it is asked for


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_without_allowed_sources_the_routes_are_not_there(start: Start, folder: Path, path: str) -> None:
    plane = start()
    body = {"lora_name": "poet", "lora_path": str(folder / "poet")}
    for method in ("POST", "GET", "PUT", "DELETE", "OPTIONS"):
        response = plane.http.request(method, path, json=body)
        assert plane.refused(response)[:2] == (404, "not_found"), method
    assert list(plane.models()) == ["base", "org/alias"]


def test_with_them_they_need_the_admin_key(start: Start, folder: Path) -> None:
    plane = start(folder)
    body = {"lora_name": "poet", "lora_path": str(folder / "poet")}
    for path in (LOAD, UNLOAD):
        assert httpx.post(plane.server.url + path, json=body).status_code == 401
        assert httpx.post(plane.server.url + path, json=body, headers=bearer("alice")).status_code == 403
        assert plane.http.get(path).status_code == 405
    assert "poet" not in plane.models()


# What planes send


def test_aibrix(start: Start, folder: Path) -> None:
    """Its controller looks for the name among the models, loads it where it is not, and unloads it at the end."""
    plane = start(folder)
    assert "poet" not in plane.models()
    answer = plane.load("poet", folder / "poet")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    assert plane.models()["poet"]["parent"] == "base" and plane.answered_by("poet") == "poet@1"
    answer = plane.unload("poet")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert "poet" not in plane.models()
    wait_until(lambda: plane.unload("poet").status_code == 404)
    assert plane.refused(plane.unload("poet")) == (404, "adapter_not_found", "lora_name")
    assert plane.sources() == [str(folder / "poet")] and plane.is_tidy()


def test_production_stack(start: Start, folder: Path) -> None:
    """Its operator loads again what a lost answer leaves unknown, and takes 200 alone for a success."""
    plane = start(folder)
    for _ in range(3):
        assert plane.load("poet", folder / "poet").status_code == 200
    assert plane.http.get("/v1/adapters/poet").json()["versions"][0]["version"] == 1
    assert len(plane.http.get("/v1/adapters/poet").json()["versions"]) == 1
    registered = [model for model in plane.models().values() if model["parent"] is not None]
    assert [model["id"] for model in registered] == ["poet"]
    other = plane.load("poet", folder / "poet-2")
    assert plane.refused(other) == (400, "invalid_request", "load_inplace") and "has already been loaded" in other.text
    assert plane.answered_by("poet") == "poet@1", "other content replaces nothing unless that is asked for"


def test_a_trainer_loads_in_place_step_after_step(start: Start, folder: Path) -> None:
    """TRL: always with load_inplace, also the first time, from a folder that it writes anew."""
    plane = start(folder)
    for step in range(1, 4):
        write_adapter(folder / f"step-{step}", BASE, 10 + step)
        assert plane.load("policy", folder / f"step-{step}", load_inplace=True).status_code == 200
        assert plane.answered_by("policy") == f"policy@{step}"
    assert plane.load("policy", folder / "step-1", load_inplace=True).status_code == 200
    assert plane.answered_by("policy") == "policy@1", "known content is the version that it is"


def test_a_load_in_place_leaves_running_requests_their_version(start: Start, folder: Path) -> None:
    plane = start(folder)
    plane.load("poet", folder / "poet")
    body = {"model": "poet", "max_tokens": 400, "seconds_per_token": 0.01, "stream": True}
    with plane.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert plane.load("poet", folder / "poet-2", load_inplace=True).status_code == 200
        assert plane.answered_by("poet") == "poet@2"
        rest = [json.loads(line[6:])["model"] for line in lines if line.startswith("data: {")]
    assert rest and set(rest) == {"poet@1"}


def test_a_name_uploaded_before_is_the_same_name(start: Start, folder: Path) -> None:
    plane = start(folder)
    files = {
        part: (folder / "poet" / name).read_bytes() for part, name in zip(("config", "weights"), FILES, strict=True)
    }
    plane.http.post("/v1/adapters", data={"name": "poet", "activate": "false"}, files=files).raise_for_status()
    assert "poet" not in plane.models()
    assert plane.load("poet", folder / "poet").status_code == 200
    assert plane.answered_by("poet") == "poet@1"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"base_model_name": "another"}, "base_model_name"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_path": ""}, "lora_path"),
        ({"lora_path": None}, "lora_path"),
        ({"lora_name": ""}, "lora_name"),
        ({"load_inplace": "yes"}, "load_inplace"),
        ({"priority": 3}, "priority"),
    ],
)
def test_no_field_is_taken_and_ignored(start: Start, folder: Path, more: dict[str, Any], param: str) -> None:
    plane = start(folder)
    response = plane.http.post(LOAD, json={"lora_name": "poet", "lora_path": str(folder / "poet"), **more})
    assert plane.refused(response) == (400, "invalid_request", param)
    whole = {"lora_name": "poet", "lora_path": str(folder / "poet"), "base_model_name": "org/alias"}
    assert plane.http.post(LOAD, json=whole | {"load_inplace": False, "is_3d_lora_weight": False}).status_code == 200
    assert plane.http.post(UNLOAD, json={"lora_name": "poet", "lora_int_id": 7}).status_code == 200


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Poet", (400, "invalid_name")), ("base", (409, "name_conflict")), ("../x", (400, "invalid_name"))],
)
def test_a_name_is_checked_before_anything_is_fetched(
    start: Start, hub: Hub, name: str, expected: tuple[int, str]
) -> None:
    plane = start("hf://acme/")
    assert plane.refused(plane.load(name, "hf://acme/poet")) == (*expected, "lora_name")
    assert not hub.asked


def test_what_is_there_must_be_an_adapter(start: Start, folder: Path) -> None:
    plane = start(folder)
    (folder / "poet" / "adapter_config.json").write_text("{}")
    response = plane.load("poet", folder / "poet")
    assert plane.refused(response)[:2] == (400, "invalid_adapter") and response.json()["error"]["violations"]
    (folder / "poet" / "adapter_model.safetensors").unlink()
    assert plane.refused(plane.load("poet", folder / "poet")) == (404, "not_found", "lora_path")
    assert plane.refused(plane.load("poet", folder / "nobody")) == (404, "not_found", "lora_path")
    assert plane.is_tidy() and "poet" not in plane.models()


def test_weights_over_the_limit_are_refused(start: Start, folder: Path) -> None:
    size = (folder / "poet" / "adapter_model.safetensors").stat().st_size
    plane = start(folder, max_adapter_bytes=size - 1)
    assert plane.refused(plane.load("poet", folder / "poet")) == (413, "adapter_too_large", "lora_path")
    assert plane.is_tidy()


# Where nothing may be loaded from


def spellings(folder: Path) -> Iterator[str]:
    """Ways to write the path of an adapter outside the allowed folder; one of them would be a way out."""
    spy = f"{folder}-evil/spy"
    yield from (spy, f"file://{spy}", spy + "/", f"{folder}-evil", f"{folder}-evil/", f"{folder}/../allowed-evil/spy")
    yield from (
        f"{folder}/./../allowed-evil/spy",
        f"{folder}/poet/../../allowed-evil/spy",
        f"{folder}//..//allowed-evil/spy",
    )
    yield from (
        f"{folder}/%2e%2e/allowed-evil/spy",
        f"{folder}/..%2fallowed-evil/spy",
        f"{folder}%2f..%2fallowed-evil/spy",
    )
    yield from (
        f"{folder}/%252e%252e/allowed-evil/spy",
        f"{folder}/\uff0e\uff0e/allowed-evil/spy",
        f"{folder}/..\\allowed-evil\\spy",
    )
    yield from (
        f"{folder}/.. /allowed-evil/spy",
        f"{folder}/...//allowed-evil/spy",
        f"{folder}\0-evil/spy",
        f"{spy}\0",
        f"\0{spy}",
    )
    yield from (
        f"{folder}/poet\0/../../allowed-evil/spy",
        f"//{spy}",
        f"/{spy}",
        f" {spy}",
        f"{spy}\n",
        f"{folder}\n-evil/spy",
    )
    yield from (
        f"file:{spy}",
        f"file:/{spy}",
        f"file:///{spy}",
        f"file://localhost{spy}",
        f"FILE://{spy}",
        f"File://{spy}",
    )
    yield from (
        f"file://{folder}/../allowed-evil/spy",
        f"file://{folder}?/../../allowed-evil/spy",
        f"file://{folder}#{spy}",
    )
    yield from (f"file://user@{spy}", f"file://{folder}/..;/allowed-evil/spy", f"{folder}/poet/..;/../allowed-evil/spy")
    yield from (
        f"~{spy}",
        "~/spy",
        "$HOME/spy",
        "spy",
        "./spy",
        "../allowed-evil/spy",
        "allowed-evil/spy",
        ".",
        "..",
        "/",
        "",
    )
    yield from (
        f"{folder}/link",
        f"{folder}/linked/spy",
        f"{folder}/poet/../link",
        f"{folder}/links/config",
        f"{folder}/links/weights",
    )
    yield from (f"/proc/self/root{spy}", f"/proc/self/cwd/../..{spy}", f"/dev/fd/../..{spy}", f"{folder}/root{spy}")
    yield from (
        f"http://127.0.0.1{spy}",
        f"https://example.com{spy}",
        f"ftp://{spy}",
        f"data:{spy}",
        f"jar:file://{spy}!/x",
    )
    yield from (f"memory://{spy}", f"unix://{spy}", f"hf://{spy}", f"s3://{spy}", f"abfs://{spy}", f"hf+file://{spy}")
    yield from (
        f"{folder}/\ud800",
        f"{folder}/" + "a" * 2000,
        f"{folder}/" + "a/" * 400,
        "hf://",
        "s3://",
        "file://",
        "://",
    )


def test_no_spelling_leaves_the_allowed_folder(start: Start, folder: Path) -> None:
    spy = folder.parent / "allowed-evil" / "spy"
    (folder / "link").symlink_to(spy)
    (folder / "linked").symlink_to(spy.parent)
    (folder / "root").symlink_to("/")
    for linked in ("config", "weights"):
        mixed = folder / "links" / linked
        mixed.mkdir(parents=True)
        for part, name in zip(("config", "weights"), FILES, strict=True):
            if part == linked:
                (mixed / name).symlink_to(spy / name)
            else:
                (mixed / name).write_bytes((spy / name).read_bytes())
    plane = start(folder)
    for spelling in spellings(folder):
        body = json.dumps({"lora_name": "spy", "lora_path": spelling}).encode()
        response = plane.http.post(LOAD, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 403, 404), (spelling, response.text)
        assert response.json()["error"]["param"] == "lora_path", (spelling, response.text)
    assert "spy" not in plane.models() and plane.is_tidy()
    assert plane.load("poet", f"file://{folder}/poet/").status_code == 200, (
        "a plain spelling of one inside is none of them"
    )
    assert plane.load("clerk", folder / "team" / "clerk").status_code == 200


def test_what_is_outside_is_refused_alike_whether_it_is_there_or_not(start: Start, folder: Path) -> None:
    plane = start(folder)
    answers = {
        plane.load("spy", place).status_code for place in (f"{folder}-evil/spy", "/nowhere/at/all", "/etc/shadow")
    }
    assert answers == {403}


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_what_is_no_plain_file_is_not_waited_for(start: Start, folder: Path, kind: str) -> None:
    config = folder / "poet" / "adapter_config.json"
    config.unlink()
    if kind == "fifo":
        os.mkfifo(config)
    elif kind == "folder":
        config.mkdir()
    else:
        here = os.getcwd()
        os.chdir(config.parent)  # the path of a socket is short
        try:
            socket.socket(socket.AF_UNIX).bind(config.name)
        finally:
            os.chdir(here)
    plane = start(folder)
    assert plane.load("poet", folder / "poet").status_code == 400
    assert plane.is_tidy()


@pytest.mark.parametrize("swapped", ["team", "team/clerk"])
@pytest.mark.parametrize("when", ["team", "clerk", *FILES])
def test_a_link_put_there_meanwhile_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, swapped: str
) -> None:
    """Just before each step of the walk a folder of the path becomes a link to one outside."""
    write_adapter(folder.parent / "allowed-evil" / "team" / "clerk", BASE, 9)
    into, opened = tmp_path / "into", os.open
    into.mkdir()
    inside = {name: (folder / "team" / "clerk" / name).read_bytes() for name in FILES}

    def open_just_after_a_swap(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if os.path.basename(path) == when and not (folder / swapped).is_symlink():
            (folder / swapped).rename(folder / "gone")
            (folder / swapped).symlink_to(folder.parent / "allowed-evil" / swapped)
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(child.os, "open", open_just_after_a_swap)
    parts = [*folder.parts[1:], "team", "clerk"]
    try:
        child._from_folder(len(folder.parts) - 1, ["team", "clerk"], parts, into, 10**6)
    except child._CannotFetchError as error:
        assert error.outcome == "refused"
    else:
        assert {name: (into / name).read_bytes() for name in FILES} == inside, "what was judged is what was read"
    assert (folder / swapped).is_symlink()


OUTSIDE_THE_BUCKET = [
    "{0}-evil/spy", "{0}-evil", "{0}/../{1}-evil/spy", "{0}/poet/../../{1}-evil/spy", "{0}/%2e%2e/{1}-evil/spy",
    "{0}//poet", "{0}/./poet", "{0}/poet?versionId=1", "{0}/poet#x", "s3://other/{1}/poet", "S3://adapters/{1}/poet",
    "s3://adapters//{1}/poet", "s3://adapters", "s3://adapters/", "s3://key:secret@adapters/{1}/poet",
    "gs://adapters/{1}/poet",
    "s3a://adapters/{1}/poet", "s3://adapters.evil/{1}/poet", "s3://adapters:80/{1}/poet", "s3://adapters\\/{1}/poet",
    "https://adapters.s3.amazonaws.com/{1}/poet", "s3://ADAPTERS/{1}/poet", "s3:///adapters/{1}/poet",
    "{0}/po\0et", "{0}/po et",
]  # fmt: skip


def test_no_spelling_leaves_the_allowed_prefix(start: Start, folder: Path, bucket: str, s3_address: str) -> None:
    put(f"{bucket}/poet", folder / "poet", s3_address)
    put(f"{bucket}-evil/spy", folder / "poet", s3_address)
    put(f"{bucket}-evil", folder / "poet", s3_address)
    plane = start(f"{bucket}/")
    for spelling in (text.format(bucket, bucket.rpartition("/")[2]) for text in OUTSIDE_THE_BUCKET):
        assert plane.load("spy", spelling).status_code in (400, 403), spelling
    assert plane.load("poet", f"{bucket}/poet").status_code == 200
    assert plane.sources() == [f"{bucket}/poet"] and "spy" not in plane.models()


OUTSIDE_THE_HUB = [
    "hf://acme-evil/poet", "hf://evil/acme", "hf://acme", "hf://acme/", "hf://acme/../evil/poet", "hf://acme/poet/../x",
    "hf://acme//poet", "hf://acme/poet@refs/pr/1", "hf://acme/poet@../../evil/poet/resolve/main", "hf://acme/poet@",
    "hf://acme/poet@main@evil", "hf://acme/poet@-x", "hf://acme/poet@main/../x", "hf://acme/poet?revision=evil",
    "hf://acme/poet#main", "hf://acme/%70oet", "hf://acme/poet%2f..", "hf://acme\\poet",
    "HF://acme/poet", "hf:acme/poet",
    "hf://datasets/acme/poet", "hf://spaces/acme/poet", "evil/poet", "hf://acme/po\0et", "hf://user@acme/poet",
    "hf://acme/.poet", "hf://acme/poet@main\n", "https://huggingface.co/acme/poet", "hf://acme/poet@refs%2Fpr%2F1",
]  # fmt: skip


def test_no_spelling_leaves_the_allowed_owner(start: Start, folder: Path, hub: Hub) -> None:
    for repository in ("acme/poet", "acme-evil/poet", "evil/poet", "evil/acme"):
        hub.add(repository, folder / "poet", "main", "refs/pr/1")
    plane = start("hf://acme/")
    for spelling in OUTSIDE_THE_HUB:
        assert plane.load("spy", spelling).status_code in (400, 403), spelling
    assert not hub.asked, "the hub is not even asked"


# The hub


def test_a_repository_is_loaded_at_the_commit_that_is_recorded(start: Start, folder: Path, hub: Hub) -> None:
    first = hub.add("acme/poet", folder / "poet", "main", "v1")
    plane = start("hf://acme/poet")
    assert plane.load("poet", "hf://acme/poet").status_code == 200
    second = hub.add("acme/poet", folder / "poet-2")
    assert plane.load("poet", "acme/poet", load_inplace=True).status_code == 200, "as AIBrix sends huggingface://"
    assert plane.answered_by("poet") == "poet@2"
    for revision in ("v1", first):
        assert plane.load("poet", f"hf://acme/poet@{revision}", load_inplace=True).status_code == 200
        assert plane.answered_by("poet") == "poet@1"
    assert plane.sources() == [f"hf://acme/poet@{commit}" for commit in (first, second, first, first)]
    assert plane.refused(plane.load("x", "hf://acme/other")) == (403, "forbidden", "lora_path")
    assert plane.is_tidy()


def test_what_the_hub_does_not_have_is_not_found(start: Start, folder: Path, hub: Hub) -> None:
    hub.add("acme/empty", folder)
    hub.add("acme/poet", folder / "poet")
    hub.moved["acme/old"] = "acme/poet"
    plane = start("hf://acme/")
    for place in ("hf://acme/nobody", "hf://acme/poet@v9", "hf://acme/empty"):
        assert plane.refused(plane.load("x", place)) == (404, "not_found", "lora_path")
    moved = plane.load("x", "hf://acme/old")
    assert plane.refused(moved) == (400, "invalid_request", "lora_path") and "renamed" in moved.text
    assert plane.is_tidy()


def test_a_hub_that_understates_a_size_writes_no_more_than_may_be(start: Start, folder: Path, hub: Hub) -> None:
    size = (folder / "poet" / "adapter_model.safetensors").stat().st_size
    plane = start("hf://acme/", max_adapter_bytes=size - 1)
    commit = hub.add("acme/poet", folder / "poet")
    assert plane.refused(plane.load("x", "hf://acme/poet"))[:2] == (413, "adapter_too_large")
    assert not [path for _, path in hub.asked if "/resolve/" in path], "by what the hub says of it"
    hub.claims[commit, "adapter_model.safetensors"] = 1
    assert plane.refused(plane.load("x", "hf://acme/poet"))[:2] == (413, "adapter_too_large")
    assert plane.is_tidy()


def test_while_a_place_does_not_answer_everything_else_goes_on(
    start: Start, folder: Path, hub: Hub, bucket: str, s3_address: str
) -> None:
    hub.add("acme/poet", folder / "poet")
    put(f"{bucket}/clerk", folder / "team" / "clerk", s3_address)
    hub.gate.clear()
    plane = start("hf://acme/", folder, bucket, max_uploads=2)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(Plane(plane.server).load, "poet", "hf://acme/poet") for _ in range(6)]
        assert hub.arrived.wait(PATIENCE_S)
        assert plane.load("clerk", f"{bucket}/clerk").status_code == 200
        assert plane.answered_by("clerk") == "clerk@1" and plane.http.get("/ready").status_code == 200
        files = {part: (folder / "poet" / n).read_bytes() for part, n in zip(("config", "weights"), FILES, strict=True)}
        assert plane.http.post("/v1/adapters", data={"name": "ode"}, files=files).status_code == 201
        assert not any(each.done() for each in waiting)
        hub.gate.set()
        assert {each.result().status_code for each in waiting} == {200}
    asked = [path for _, path in hub.asked].count("/api/models/acme/poet")
    assert asked <= 2, "asked for six times: the load that has begun, and one for all who came later"
    assert plane.answered_by("poet") == "poet@1" and plane.is_tidy()


def test_a_place_that_sends_nothing_is_given_up(start: Start, hub: Hub) -> None:
    hub.gate.clear()
    plane = start("hf://acme/", upload_idle_timeout_s=2.0)
    response = plane.load("poet", "hf://acme/poet")
    assert plane.refused(response) == (503, "adapter_unavailable", "lora_path") and "too slow" in response.text
    assert plane.is_tidy()


def test_a_place_that_cannot_be_reached_is_unavailable(
    start: Start, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    plane = start("hf://acme/", bucket)
    for place in ("hf://acme/poet", f"{bucket}/poet"):
        assert plane.refused(plane.load("poet", place)) == (503, "adapter_unavailable", "lora_path")


def test_a_server_that_ends_leaves_no_fetch_behind(tmp_path: Path, hub: Hub) -> None:
    hub.gate.clear()
    with servers(tmp_path) as start:
        plane = start("hf://acme/")
        thread = threading.Thread(target=plane.cut_off, args=("hf://acme/poet",))
        thread.start()
        assert hub.arrived.wait(PATIENCE_S)
        assert fetches_of(os.getpid())
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and not fetches_of(os.getpid())


def fetches_of(parent: int) -> list[int]:
    """The processes of `parent` that fetch."""
    found = []
    for each in Path("/proc").iterdir():
        try:
            is_child = each.name.isdigit() and f"\nPPid:\t{parent}\n" in (each / "status").read_text()
            if is_child and b"server.sources.child" in (each / "cmdline").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue
    return found


def test_a_fetch_ends_with_its_server_whatever_ends_that(hub: Hub, tmp_path: Path) -> None:
    hub.gate.clear()
    order = {"place": "hf://acme/poet", "scheme": "hf", "parts": ["acme", "poet"], "root_parts": 1, "revision": None}
    command = [sys.executable, "-m", "server.sources.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order | {"into": str(tmp_path), "max_bytes": 99}).encode() + b"\n")
        process.stdin.flush()
        assert hub.arrived.wait(PATIENCE_S) and process.poll() is None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 1


# Buckets


def test_a_bucket(start: Start, folder: Path, bucket: str, s3_address: str) -> None:
    put(f"{bucket}/poet", folder / "poet", s3_address)
    size = (folder / "poet" / "adapter_model.safetensors").stat().st_size
    plane = start(bucket, max_adapter_bytes=size)
    assert plane.load("poet", f"{bucket}/poet/").status_code == 200 and plane.answered_by("poet") == "poet@1"
    assert plane.refused(plane.load("x", f"{bucket}/nobody")) == (404, "not_found", "lora_path")
    large = Bucket(f"{bucket}/large", endpoint=s3_address, **S3_OPTIONS)
    large.create(FILES[0], (folder / "poet" / FILES[0]).read_bytes())
    large.create(FILES[1], b"x" * (size + 1))
    assert plane.refused(plane.load("x", f"{bucket}/large")) == (413, "adapter_too_large", "lora_path")
    assert plane.is_tidy()


# What routers read


def test_the_gauges_follow_what_is_loaded(start: Start, folder: Path) -> None:
    plane = start(folder)
    empty = gauges(plane)
    assert empty["vllm:lora_adapter_loaded"] == {} and empty["vllm:num_gpu_loaded_lora_adapters"] == {("base",): 0}
    for name, path in (("poet", "poet"), ("clerk", "team/clerk")):
        plane.load(name, folder / path)
    plane.answered_by("poet")
    plane.http.patch("/v1/adapters/clerk", json={"pinned": True}).raise_for_status()
    plane.load("spare", folder / "poet-2")
    found = gauges(plane)
    assert found["vllm:lora_adapter_loaded"] == {
        ("poet", "gpu", "false", "16"): 1, ("clerk", "gpu", "true", "16"): 1, ("spare", "cpu", "false", "16"): 1,
    }  # fmt: skip
    rows = plane.http.get("/v1/adapters/poet").json()["versions"][0]["rows"]
    assert found["vllm:num_gpu_loaded_lora_adapters"] == {("base",): 2}
    assert found["vllm:max_gpu_lora_adapters"] == {("base",): 1000 // rows}
    plane.http.patch("/v1/adapters/clerk", json={"pinned": False}).raise_for_status()
    plane.unload("clerk")
    wait_until(lambda: plane.http.get("/v1/adapters/clerk").status_code == 404)
    left = gauges(plane)
    assert {key[0] for key in left["vllm:lora_adapter_loaded"]} == {"poet", "spare"}
    assert left["vllm:max_gpu_lora_adapters"] == found["vllm:max_gpu_lora_adapters"]


def gauges(plane: Plane) -> dict[str, dict[tuple[str, ...], float]]:
    """The gauges, by the values of their labels in the order in which they stand."""
    from prometheus_client.parser import text_string_to_metric_families

    page = plane.http.get("/metrics", headers={"accept-encoding": "identity"}).text
    names = ("vllm:lora_adapter_loaded", "vllm:num_gpu_loaded_lora_adapters", "vllm:max_gpu_lora_adapters")
    families = {f.name: f for f in text_string_to_metric_families(page) if f.name in names}
    return {name: {tuple(s.labels.values()): s.value for s in families[name].samples} for name in names}
