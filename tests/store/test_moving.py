"""`perft store`: moved there and back a store is what it was; checked, every damage is named; swept, the rest goes."""

import json
from pathlib import Path

import pytest

from adapters.errors import StoreUnusableError
from adapters.store import FolderStore, open_store, verify_store
from adapters.store.log.entries import blob_key, entry_key
from adapters.store.log.store import LogStore
from server.client.commands import run as run_adapters
from server.commands.store import run
from tests.store.places import Shared, s3_server
from tests.store_contents import lora, perft, remove, table, upload


def filled(folder: Path) -> FolderStore:
    """A store with all that one can have: rights, pins, a version being deleted, deleted names."""
    store = FolderStore.open(folder)
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    upload(store, "b", perft(1, "b's own"), allowed_keys=("x",))
    upload(store, "c", lora(), activate=False)
    store.update("a", pinned=True)
    store.start_delete("a", 1)
    upload(store, "gone", perft(3), allowed_keys=("y",))
    remove(store, "gone")
    return store


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path / "one")
    before = table(store)
    store.close()
    address = f"file://{tmp_path / 'shared'}"
    assert run(["migrate", str(tmp_path / "one"), address]) == 0
    assert "3 adapters" in capsys.readouterr().out
    shared = open_store(address, tmp_path / "cache")
    assert table(shared) == before
    assert (shared.fetch(perft(1).digest) / "adapter_model.safetensors").read_bytes() == perft(1).weights
    record, version, _ = upload(shared, "gone", perft(3))
    assert (version.version, record.allowed_keys) == (2, ("y",)), "a deleted name is remembered"
    remove(shared, "gone")
    shared.finish_delete("a", 1)
    after = table(shared)
    shared.close()
    assert verify_store(address) == [] and run(["verify", address]) == 0
    assert run(["migrate", address, str(tmp_path / "two")]) == 0
    back = open_store(str(tmp_path / "two"), tmp_path / "unused")
    assert table(back) == after and back.problems == []  # type: ignore[attr-defined]
    assert upload(back, "gone", perft(3))[1].version == 3
    back.close()
    assert verify_store(tmp_path / "two") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "one", "shared", "two"]


def test_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address alone, with credentials from the environment, as an operator has them."""
    filled(tmp_path / "one").close()
    with s3_server() as endpoint:
        for name, value in {
            "AWS_ENDPOINT": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        assert run(["migrate", str(tmp_path / "one"), "s3://adapters/production"]) == 0
        assert run(["verify", "s3://adapters/production"]) == 0
        assert run_adapters(["verify", "s3://adapters/production"]) == 0


REFUSED: list[tuple[list[str], str]] = [
    (["migrate", "ONE", "TWO"], "expected the folder of one server and an address"),
    (["migrate", "file:///x", "s3://y"], "expected the folder of one server and an address"),
    (["migrate", "NOTHING", "file://TMP/shared"], "found no STORE.json"),
    (["migrate", "ONE", "ftp://somewhere"], "found the scheme 'ftp', expected file, s3"),
    (["migrate", "ONE", "file://host/x"], "expected file:///PATH"),
    (["migrate", "ONE", "s3://user:secret@bucket"], "contains a user or a password"),
    (["migrate", "ONE", "file://TMP/full"], "found objects, expected nothing"),
    (["migrate", "file://TMP/full", "TWO"], "found no STORE.json, expected a store"),
    (["verify", "file://TMP/full"], "found no STORE.json, expected a store"),
    (["sweep", "nonsense://x"], "found the scheme 'nonsense'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(each[0]) for each in REFUSED])
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled(tmp_path / "one").close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    names = {"ONE": str(tmp_path / "one"), "TWO": str(tmp_path / "two"), "NOTHING": str(tmp_path / "nothing")}
    status = run([names.get(each, each.replace("TMP", str(tmp_path))) for each in arguments])
    said = capsys.readouterr()
    assert status == 1 and message in said.err + said.out and "secret" not in said.err
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert verify_store(tmp_path / "one") == []


def test_a_migration_that_was_broken_off_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.store import migrate

    filled(tmp_path / "one").close()
    monkeypatch.setattr(migrate, "_append", lambda *arguments, **named: (_ for _ in ()).throw(OSError("no space")))
    address = f"file://{tmp_path / 'shared'}"
    assert run(["migrate", str(tmp_path / "one"), address]) == 1
    assert not (tmp_path / "shared" / "STORE.json").exists()
    monkeypatch.undo()
    assert run(["migrate", str(tmp_path / "one"), address]) == 1, "what it left must be removed first"


def damage(shared: Shared, key: str, data: bytes | None) -> None:
    shared.objects.remove(key)
    if data is not None:
        shared.objects.create(key, data)


def test_verify_names_every_problem(shared: Shared) -> None:
    from adapters.store.log.verify import verify_log

    store = shared.open()
    assert isinstance(store, LogStore)
    upload(store, "a", perft(1))
    upload(store, "b", perft(2))
    upload(store, "c", perft(3))
    places = {digest: store._state.uploads[digest].id for digest in (perft(seed).digest for seed in (1, 2, 3))}
    store.close()
    assert verify_log(shared.objects) == []
    weights = {d: blob_key(d, upload_id, "adapter_model.safetensors") for d, upload_id in places.items()}
    damage(shared, weights[perft(1).digest], None)
    damage(shared, weights[perft(2).digest], bytes(len(perft(2).weights)))
    damage(shared, "snapshot/000000000002.json", b"{}")
    damage(shared, "mine.txt", b"mine")
    found = "\n".join(verify_log(shared.objects))
    for expected in (
        "mine.txt: not part of a store", "(a@1): its files are missing", "(b@1): the files' digest is",
        "snapshot/000000000002.json: ",
    ):  # fmt: skip
        assert expected in found, found
    assert "c@1" not in found
    entry = json.loads(shared.objects.get(entry_key(2)) or b"")
    damage(shared, entry_key(2), None)
    assert f"{entry_key(3)}: found after entry 1, expected {entry_key(2)}" in verify_log(shared.objects)
    damage(shared, entry_key(2), json.dumps(entry | {"name": 3}).encode())
    assert any(problem.startswith(f"{entry_key(2)}: name:") for problem in verify_log(shared.objects))
    damage(shared, "STORE.json", b"{")
    with pytest.raises(StoreUnusableError):
        shared.open()
    assert len(verify_log(shared.objects)) == 1


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an upload that was broken off left is removed after a day, and no earlier."""
    import os

    filled(tmp_path / "one").close()
    address = f"file://{tmp_path / 'shared'}"
    assert run(["migrate", str(tmp_path / "one"), address]) == 0
    for age in (0, 2 * 86400):
        orphan = tmp_path / "shared" / "blobs" / perft(1).digest / f"broken-{age}" / "adapter_config.json"
        orphan.parent.mkdir(parents=True)
        orphan.write_text("{}")
        os.utime(orphan, (orphan.stat().st_mtime - age,) * 2)
    capsys.readouterr()
    assert run(["sweep", address]) == 0 and "1 objects" in capsys.readouterr().out
    assert sorted(p.name for p in orphan.parent.parent.glob("broken-*")) == ["broken-0"]
    assert verify_store(address) == []
