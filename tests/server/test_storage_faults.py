"""What the storage does to a running server: it fills up, becomes read-only, is somebody else's. Every refusal says
why, nothing is lost, and once the storage is well again so is the server."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.store import verify_folder
from tests.server.fake_server import bearer
from tests.server.fakes import BASE
from tests.server.processes import wait_until
from tests.soak.clients import http_client
from tests.soak.contents import content_of
from tests.soak.disks import SmallDisk, small_disk
from tests.soak.zygote import ForkedServer, Zygote, zygote
from tests.store_contents import Content
from tests.synthetic import RANDOM_R, write_adapter

KEY = bearer()["Authorization"].removeprefix("Bearer ")
UPLOADS_WITHOUT_A_SMALL_DISK = 4


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(tmp_path_factory.mktemp("servers")) as made:
        yield made


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Content]:
    """Adapters of about 140 kB."""
    folder, values = tmp_path_factory.mktemp("contents"), RANDOM_R | {"bottleneck": 256}
    return [content_of(write_adapter(folder / str(seed), BASE, seed, values), BASE) for seed in range(20)]


@pytest.fixture
def disk(tmp_path: Path, parent: Zygote) -> Iterator[SmallDisk]:
    """The servers of a test are ended before its disk goes."""
    with small_disk(tmp_path) as disk:
        yield disk
        for server in parent.servers:
            if server.is_alive():
                server.kill()


class Client:
    """One server, asked as its admin."""

    def __init__(self, parent: Zygote, disk: SmallDisk, *flags: str) -> None:
        self._parent, self._disk, self._flags = parent, disk, flags
        self.start()

    def start(self) -> None:
        flags = ["--rows", "100000", "--audit-log", str(self._disk.faults.with_name("audit.jsonl")), *self._flags]
        self.server = self._parent.start(self._disk.store, *flags, faults=self._disk.faults)
        self.server.wait_until_ready()
        self.http = http_client(self.server.url, KEY)

    def restart(self) -> None:
        """Killed, and started anew."""
        self.server.kill()
        self.start()

    def upload(self, name: str, content: Content) -> httpx.Response:
        files = {"config": content.config, "weights": content.weights}
        return self.http.post("/v1/adapters", data={"name": name}, files=files)

    def listed(self) -> dict[str, dict[int, str]]:
        """The digest of every version of every name."""
        adapters = self.http.get("/v1/adapters").raise_for_status().json()["data"]
        return {each["name"]: {v["version"]: v["digest"] for v in each["versions"]} for each in adapters}

    def answers(self, model: str) -> str:
        """Which version answers."""
        answer = self.http.post("/v1/completions", json={"model": model, "max_tokens": 1}).raise_for_status()
        return str(answer.json()["model"])

    def wait_until_gone(self, name: str) -> None:
        wait_until(lambda: self.http.get(f"/v1/adapters/{name}").status_code == 404)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code
    return str(error["message"])


def check_all_is_there(client: Client, disk: SmallDisk, expected: dict[str, dict[int, str]]) -> None:
    """Listed, sound, the bytes as uploaded, and nothing on its way in."""
    assert client.listed() == expected and verify_folder(disk.store) == []
    assert not list((disk.store / "staging").iterdir())
    for name, versions in expected.items():
        for number in versions:
            file = client.http.get(f"/v1/adapters/{name}/versions/{number}/files/weights").raise_for_status()
            assert len(file.content) > 1000


def fill_by_uploads(client: Client, disk: SmallDisk, contents: Sequence[Content]) -> tuple[int, httpx.Response]:
    """Upload until one is refused: how many were not, and the refusal."""
    for number, content in enumerate(contents):
        if not disk.is_real and number == UPLOADS_WITHOUT_A_SMALL_DISK:
            disk.fill()
        answer = client.upload(f"name-{number}", content)
        if answer.status_code != 201:
            return number, answer
    raise AssertionError("the disk took them all")


def test_a_store_that_fills_up(parent: Zygote, disk: SmallDisk, contents: Sequence[Content]) -> None:
    """Audit log and all on the same disk: what is there stays and is served, and a delete makes room."""
    client = Client(parent, disk, "--audit-log", str(disk.root / "audit.jsonl"))
    taken, refusal = fill_by_uploads(client, disk, contents)
    refused(refusal, 507, "storage_full")
    assert taken >= UPLOADS_WITHOUT_A_SMALL_DISK
    expected = {f"name-{number}": {1: contents[number].digest} for number in range(taken)}
    check_all_is_there(client, disk, expected)
    assert all(client.answers(name) == f"{name}@1" for name in expected)
    client.restart()
    check_all_is_there(client, disk, expected)
    disk.free()
    assert client.http.delete("/v1/adapters/name-0").status_code == 202
    client.wait_until_gone("name-0")
    assert client.upload("after", contents[taken]).status_code == 201
    del expected["name-0"]
    check_all_is_there(client, disk, expected | {"after": {1: contents[taken].digest}})
    assert client.answers("after") == "after@1"


def test_not_a_byte_left(parent: Zygote, disk: SmallDisk, contents: Sequence[Content]) -> None:
    """Somebody else took the disk, and takes what is freed, the audit log's too: nothing comes in, also after a start
    there; what takes something away from callers works, so that room can be made."""
    if not disk.is_real:
        pytest.skip("needs a file system of its own; tests/unit/test_reserve.py has the same without one")
    client = Client(parent, disk, "--audit-log", str(disk.root / "audit.jsonl"))
    expected = {name: {1: contents[0].digest, 2: contents[number].digest} for number, name in enumerate("abcd", 1)}
    for name, versions in expected.items():
        for digest in versions.values():
            content = next(each for each in contents if each.digest == digest)
            assert client.upload(name, content).status_code == 201
    labels = ["alice", "bob"]
    for round_ in range(2):
        disk.fill()
        message = refused(client.upload("x", contents[9]), 507, "storage_full")
        assert "full" in message or "No space left" in message
        active = 1 + round_
        assert client.http.patch("/v1/adapters/a", json={"active": active}).status_code == 200
        assert client.http.patch("/v1/adapters/a", json={"allowed_keys": [labels[round_]]}).status_code == 200
        assert client.answers("a") == f"a@{active}"
        check_all_is_there(client, disk, expected)
        client.restart()
        assert client.http.get("/v1/adapters/a").json()["allowed_keys"] == [labels[round_]]
    for name in "bcd":
        disk.fill()
        assert client.http.delete(f"/v1/adapters/{name}/versions/1").status_code == 202
        wait_until(lambda name=name: 1 not in client.listed()[name])  # type: ignore[misc]
        disk.fill()
        assert client.http.delete(f"/v1/adapters/{name}").status_code == 202
        client.wait_until_gone(name)
        del expected[name]
        check_all_is_there(client, disk, expected)
    recorded = (disk.root / "audit.jsonl").read_text().splitlines()
    assert sum('"delete"' in line for line in recorded) == 6
    disk.free()
    assert client.upload("x", contents[9]).status_code == 201
    check_all_is_there(client, disk, expected | {"x": {1: contents[9].digest}})


def stable(adapter: dict[str, Any]) -> dict[str, Any]:
    """An adapter without what asking for it changes."""
    versions = [
        {k: v for k, v in version.items() if k not in ("resident", "last_used")} for version in adapter["versions"]
    ]
    return adapter | {"versions": versions}


def test_a_read_only_store_does_not_start(parent: Zygote, disk: SmallDisk, contents: Sequence[Content]) -> None:
    client = Client(parent, disk)
    client.upload("a", contents[0])
    client.server.end()
    with disk.read_only():
        server = parent.start(disk.store, faults=disk.faults)
        assert server.wait() != 0
        said = server.log.read_text()
        assert "--adapter-store" in said and "expected a folder that the server may change" in said, said
    client.start()
    check_all_is_there(client, disk, {"a": {1: contents[0].digest}})


def test_a_store_that_becomes_read_only(parent: Zygote, disk: SmallDisk, contents: Sequence[Content]) -> None:
    """Refused with the reason, what is there is served; well again without a restart."""
    client = Client(parent, disk)
    for name, content in zip("ab", contents, strict=False):
        assert client.upload(name, content).status_code == 201
    with disk.read_only():
        before = client.listed()
        for answer in (
            client.upload("c", contents[2]),
            client.http.patch("/v1/adapters/a", json={"pinned": True}),
            client.http.delete("/v1/adapters/a"),
        ):
            message = refused(answer, 503, "adapter_unavailable")
            assert "Read-only file system" in message and "Retry-After" in answer.headers, message
        assert client.listed() == before and client.answers("a") == "a@1"
    assert client.upload("c", contents[2]).status_code == 201
    assert client.http.delete("/v1/adapters/a").status_code == 202
    client.wait_until_gone("a")
    check_all_is_there(client, disk, {"b": before["b"], "c": {1: contents[2].digest}})


def test_a_delete_that_cannot_be_finished_is_tried_again(
    parent: Zygote, disk: SmallDisk, contents: Sequence[Content]
) -> None:
    hold = disk.faults.with_name("hold")
    client = Client(parent, disk, "--hold", f"evict={hold}")
    client.upload("a", contents[0])
    client.answers("a")
    hold.touch()
    assert client.http.delete("/v1/adapters/a").status_code == 202
    with disk.read_only():
        hold.unlink()
        wait_until(lambda: "retrying in" in client.server.log.read_text())
        assert client.http.get("/v1/adapters/a").json()["versions"][0]["state"] == "draining"
    client.wait_until_gone("a")
    check_all_is_there(client, disk, {})


def test_two_servers_on_one_folder(parent: Zygote, disk: SmallDisk, contents: Sequence[Content]) -> None:
    """The second one does not start, and says who has the store; the first goes on."""
    client = Client(parent, disk)
    client.upload("a", contents[0])
    second = parent.start(disk.store, "--audit-log", str(disk.root / "other.jsonl"), faults=disk.faults)
    assert second.wait() != 0
    said = second.log.read_text()
    assert f"is open in process {client.server.pid}" in said and "give this one a store of its own" in said, said
    assert client.upload("b", contents[1]).status_code == 201 and client.answers("b") == "b@1"
    check_all_is_there(client, disk, {"a": {1: contents[0].digest}, "b": {1: contents[1].digest}})
    client.server.kill()
    third: ForkedServer = parent.start(disk.store, "--audit-log", str(disk.root / "other.jsonl"), faults=disk.faults)
    third.wait_until_ready()


def test_an_audit_log_that_cannot_be_opened(parent: Zygote, disk: SmallDisk, tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    server = parent.start(disk.store, "--audit-log", str(tmp_path / "audit"))
    assert server.wait() != 0
    assert f"--audit-log {tmp_path / 'audit'}: cannot be written" in server.log.read_text()


def test_an_audit_log_that_cannot_be_written_any_more(
    parent: Zygote, disk: SmallDisk, contents: Sequence[Content], tmp_path: Path
) -> None:
    """Nothing is changed without a record."""
    log = tmp_path / "audit" / "log.jsonl"
    client = Client(parent, disk, "--audit-log", str(log))
    assert client.upload("a", contents[0]).status_code == 201
    log.rename(log.with_name("rotated"))
    log.mkdir()
    for answer in (
        client.upload("b", contents[1]),
        client.http.patch("/v1/adapters/a", json={"pinned": True}),
        client.http.delete("/v1/adapters/a"),
    ):
        assert "the audit log cannot be written" in refused(answer, 507, "storage_full")
    assert client.answers("a") == "a@1" and client.http.get("/v1/adapters/a").json()["pinned"] is False
    check_all_is_there(client, disk, {"a": {1: contents[0].digest}})
    log.rmdir()
    assert client.upload("b", contents[1]).status_code == 201
    assert len(log.read_text().splitlines()) == 1
