"""The hostile uploads of tests/hostile thrown at the real server while it streams: refused, forgotten, undisturbed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from adapters.store import verify_folder
from tests.hostile import ATTACKS, FAMILIES, Attack, Setting, good_uploads, send, send_upload
from tests.hostile.good import NAME
from tests.server import tiny_server
from tests.server.processes import ServerProcess, wait_until
from tests.server.tiny_server import BASE, BASE_NAME, KEYS, MAX_ADAPTER_BYTES, Samples, TinyClient

SETTING = Setting(BASE, BASE_NAME, MAX_ADAPTER_BYTES, timeout_s=600, idle_timeout_s=30)
HOST = "127.0.0.1"
AS_ADMIN = {"Authorization": f"Bearer {KEYS['admin']}"}
TOKENS = 120


def is_thrown(attack: Attack) -> bool:
    """Slow bodies and files over this server's limit are left to tests/hostile, which set their own limits."""
    return attack.code != "upload_timeout" and attack.needs_bytes <= MAX_ADAPTER_BYTES


THROWN = {
    family: {name: attack for name, attack in attacks.items() if is_thrown(attack)}
    for family, attacks in FAMILIES.items()
}


@pytest.fixture(scope="module")
def store(server: ServerProcess) -> Path:
    return server.log.parent / "store"


@pytest.fixture(scope="module")
def streams(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[int]]]:
    """What a tenant's streams give while the attacks run, the first of them before."""
    client, stop = TinyClient(server.url), Event()
    folder = tiny_server.adapter(tmp_path_factory.mktemp("hostile") / "calm", seed=61)
    assert client.upload("calm", folder).status_code == 201
    found = [client.stream_tokens("calm", [3, 4, 5], TOKENS)]

    def stream_on() -> None:
        while not stop.is_set():
            found.append(client.stream_tokens("calm", [3, 4, 5], TOKENS))

    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(stream_on)
        try:
            yield found
        finally:
            stop.set()
    streaming.result()
    client.remove("calm")
    client.close()


def throw(server: ServerProcess, attacks: dict[str, Attack]) -> dict[str, list[str]]:
    """Run the attacks one after the other; what was not as it should be, by attack."""
    found: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        status, body = send(attack, SETTING, HOST, server.port, AS_ADMIN)
        found[name] = attack.problems(status, body)
    return {name: problems for name, problems in found.items() if problems}


def left_over(store: Path) -> list[str]:
    """Everything in the store's folders for what is on its way in or out, by name."""
    return sorted(str(path.relative_to(store)) for part in ("staging", "trash") for path in (store / part).rglob("*"))


def state(admin: TinyClient, store: Path) -> tuple[object, list[str], float]:
    """What a refused upload must not change: the adapters, the blobs, the bytes."""
    adapters = {
        each["name"]: [v["digest"] for v in each["versions"]] for each in admin.http.get("/v1/adapters").json()["data"]
    }
    blobs = sorted(path.name for path in (store / "blobs").iterdir())
    return adapters, blobs, Samples.of(admin.metrics()).total("perft_store_bytes")


def test_enough_of_them_make_sense_here() -> None:
    assert sum(map(len, THROWN.values())) > 0.9 * len(ATTACKS) > 60


@pytest.mark.parametrize("family", THROWN)
def test_attacks_are_refused_while_streams_go_on(
    server: ServerProcess, admin: TinyClient, store: Path, streams: list[list[int]], family: str
) -> None:
    before, streamed = state(admin, store), len(streams)
    counted = Samples.of(admin.metrics())
    assert throw(server, THROWN[family]) == {}
    wait_until(lambda: not left_over(store))
    assert state(admin, store) == before
    uploads = (Samples.of(admin.metrics()) - counted).of_name("perft_uploads_total")
    counts = {dict(labels)["result"]: count for labels, count in uploads.items() if count}
    assert "created" not in counts and "existing" not in counts
    counted_ones = [a for a in THROWN[family].values() if a.code != "unsupported_encoding"]  # refused before any upload
    certain = [attack for attack in counted_ones if not attack.is_bad_http]
    assert len(certain) <= sum(counts.values()) <= len(THROWN[family])
    wait_until(lambda: len(streams) > streamed)
    assert all(tokens == streams[0] for tokens in streams), "a stream was disturbed"


def test_sound_uploads_are_still_taken(
    server: ServerProcess, admin: TinyClient, store: Path, streams: list[list[int]]
) -> None:
    """After all that, every form of a sound upload; the store is whole and the engine serves them."""
    name = NAME.decode()
    try:
        for kind, upload in good_uploads(SETTING).items():
            assert send_upload(upload, HOST, server.port, AS_ADMIN)[0] in (200, 201), kind
        assert len(admin.complete(name, [3, 4, 5], 8).tokens) == 8
        wait_until(lambda: not left_over(store))
        assert verify_folder(store) == []
        wait_until(lambda: admin.http.get("/ready").status_code == 200)
    finally:
        admin.remove(name)
    assert verify_folder(store) == []


@pytest.mark.parametrize("label", ["nobody", "alice"])
def test_who_may_not_upload_is_stopped_before_the_body(server: ServerProcess, store: Path, label: str) -> None:
    """10 GB from somebody without the right: refused at once, nothing staged."""
    headers = {"Authorization": f"Bearer {KEYS.get(label, 'wrong-key-0123456789')}"}
    for name in ("10 GB announced", "10 GB of weights", "10 GB of parts"):
        status, body = send(ATTACKS[name], SETTING, HOST, server.port, headers)
        expected = (403, b"forbidden") if label == "alice" else (401, b"invalid_api_key")
        assert (status == expected[0] and expected[1] in body) or status == 0, (name, status, body[:200])
        assert left_over(store) == []
