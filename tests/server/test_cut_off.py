"""Whole servers whose shared store is cut off, or hangs: what they let in, what they say, and how they come back."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from adapters.store.log.entries import entry_key
from adapters.store.log.shared_folder import SharedFolder
from tests.server.fake_server import bearer
from tests.server.local_server import local_server
from tests.server.processes import LIMIT_S, wait_until
from tests.server.uploads import Upload, uploader
from tests.store.wires import S3_ENVIRONMENT, S3Process, s3_behind_wires

LAG_S, GRACE_S = 1.0, 2.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Process]:
    with s3_behind_wires(2) as running:
        yield running


class Client:
    """HTTP to a server."""

    def __init__(self, url: str, folder: Path) -> None:
        self.http = httpx.Client(base_url=url, headers=bearer(), timeout=LIMIT_S)
        self.upload: Upload = uploader(self.http, folder)  # type: ignore[arg-type]

    def said(self, model: str) -> tuple[int, str]:
        """The status and the model that answered, or the code of the error."""
        answer = self.http.post("/v1/completions", json={"model": model, "max_tokens": 1})
        values = answer.json()
        return answer.status_code, values["model"] if answer.is_success else values["error"]["code"]

    def ready(self) -> tuple[int, str]:
        answer = self.http.get("/ready")
        return answer.status_code, answer.text

    def measured(self, name: str) -> float:
        """The value of a metric without labels."""
        page = self.http.get("/metrics").text
        return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} "))

    def is_ready(self) -> bool:
        return self.ready()[0] == 200


@contextmanager
def server(folder: Path, address: str, number: int) -> Iterator[Client]:
    (folder / str(number)).mkdir()
    with local_server(
        folder / str(number), adapter_store=address, adapter_cache=folder / f"cache-{number}", store_lag_s=LAG_S,
        store_grace_s=GRACE_S,
    ) as running:  # fmt: skip
        yield Client(running.url, folder)


@contextmanager
def two_servers(s3: S3Process, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Client]]:
    """Each with a wire of its own to the bucket."""
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        clients = []
        for number, wire in enumerate(s3.wires):
            monkeypatch.setenv("AWS_ENDPOINT", wire.address)
            clients.append(stack.enter_context(server(folder, f"s3://adapters/{folder.name}", number)))
        yield clients


def at_once(client: Client, *models: str) -> set[tuple[int, str]]:
    """What requests for these get, sent together."""
    with ThreadPoolExecutor(len(models)) as threads:
        return set(threads.map(client.said, models))


def test_a_server_behind_a_cut_wire(s3: S3Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_servers(s3, tmp_path, monkeypatch) as (one, two):
        assert one.upload("poet", 1).status_code == 201 and one.upload("poet", 2).status_code == 201
        assert two.said("poet") == one.said("poet") == (200, "poet@2")
        with s3.wires[1].cut():
            assert one.http.patch("/v1/adapters/poet", json={"active": 1}).status_code == 200
            assert at_once(two, "poet", "poet@1", "poet@2", *["poet"] * 13) == {(503, "store_unavailable")}
            assert two.said("base") == (200, "base")
            with ThreadPoolExecutor(2) as threads:
                refused = [threads.submit(two.upload, "painter", 3), threads.submit(two.http.get, "/v1/adapters")]
            for answer in (future.result() for future in refused):
                assert answer.status_code == 503 and answer.headers["retry-after"]
                assert answer.json()["error"]["code"] == "store_unavailable" and "http" not in answer.text
            status, text = two.ready()
            assert status == 503 and "the store has not answered for" in text
            assert two.measured("perft_ready") == 0 and two.measured("perft_store_silent_seconds") > GRACE_S
            assert one.measured("perft_ready") == 1
            assert one.is_ready() and one.said("poet") == (200, "poet@1")
            assert one.upload("painter", 3).status_code == 201
        wait_until(two.is_ready)
        assert two.measured("perft_ready") == 1 and two.measured("perft_store_names_behind") >= 0
        assert two.said("poet") == (200, "poet@1") and two.said("painter") == (200, "painter@1")
        assert two.upload("painter", 4).status_code == 201 and one.said("painter") == (200, "painter@2")


def test_a_bucket_that_hangs(s3: S3Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_servers(s3, tmp_path, monkeypatch) as (one, two):
        assert one.upload("poet", 1).status_code == 201 and two.said("poet") == (200, "poet@1")
        with s3.stopped():
            check_hanging(one)
            check_hanging(two)
        for client in (one, two):
            wait_until(client.is_ready)
            assert client.said("poet") == (200, "poet@1")
        assert two.http.patch("/v1/adapters/poet", json={"pinned": True}).status_code == 200


def check_hanging(client: Client) -> None:
    """A request that the store keeps waiting is refused; nothing else waits for it."""
    wait_until(lambda: not client.is_ready())
    with ThreadPoolExecutor(64) as threads:
        waiting = [threads.submit(client.said, "poet") for _ in range(60)]
        changes = [threads.submit(client.upload, "painter", 3) for _ in range(4)]
        assert client.said("base") == (200, "base") and client.ready()[0] == 503
        assert client.http.get("/health").status_code == 200
        assert {future.result() for future in waiting} == {(503, "store_unavailable")}
        assert {future.result().status_code for future in changes} == {503}


def test_a_shared_folder_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while its server of NFS is gone: a thread that opens a file there is kept. The server can also be stopped."""
    monkeypatch.setattr("adapters.store.address.SharedFolder", partial(SharedFolder, patience_s=3.0))
    shared = tmp_path / "shared"
    with ExitStack() as stack:
        one = stack.enter_context(server(tmp_path, f"file://{shared}", 1))
        assert one.upload("poet", 1).status_code == 201 and one.said("poet") == (200, "poet@1")
        hanging = shared / entry_key(len(list((shared / "log").iterdir())) + 1)
        os.mkfifo(hanging)
        check_hanging(one)
        writer = os.open(hanging, os.O_RDWR | os.O_NONBLOCK)
        hanging.unlink()
        os.close(writer)
        wait_until(one.is_ready)
        assert one.said("poet") == (200, "poet@1") and one.upload("poet", 2).status_code == 201
        os.mkfifo(shared / entry_key(len(list((shared / "log").iterdir())) + 1))
        wait_until(lambda: not one.is_ready())
