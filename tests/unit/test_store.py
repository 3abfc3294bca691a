"""The store in a folder: one owner, nothing lost and nothing unknown. What every store does: tests/store."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreLockedError, StoreSchemaError, StoreUnusableError
from adapters.store import FolderStore, Store, verify_folder
from adapters.store.folder import opening
from adapters.store.folder.durable import Disk
from adapters.store.records import record_file
from tests.store_contents import bytes_of, lora, perft, remove, table, upload

OLD = Path(__file__).parent / "stores"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    opened = FolderStore.open(folder)
    yield opened
    opened.close()


def reopened(store: Store, folder: Path) -> Store:
    store.close()
    return FolderStore.open(folder)


def numbers(store: Store, name: str) -> list[int]:
    record = store.get(name)
    return [] if record is None else [version.version for version in record.versions]


def test_a_deleted_name_leaves_no_file_and_no_number_to_use_again(store: Store, folder: Path) -> None:
    for seed in (1, 2, 3):
        upload(store, "gone", perft(seed))
    record = store.start_delete("gone", None)
    assert record.active is None and {v.state for v in record.versions} == {"draining"}
    store = reopened(store, folder)
    assert [store.finish_delete("gone", n) is None for n in (1, 2, 3)] == [False, False, True]
    assert not list((folder / "names").iterdir()) and not list((folder / "blobs").iterdir())
    assert json.loads((folder / "STORE.json").read_text()) == {"schema": 2, "floor": 0}
    store = reopened(store, folder)
    assert upload(store, "gone", perft(1))[1].version == 4 and upload(store, "new", perft(1))[1].version == 1
    remove(store, "new")
    assert upload(store, "new", perft(1))[1].version == 2 and verify_folder(folder) == []
    store.close()


def test_deleted_names_are_remembered_in_few_small_files_and_not_in_memory(folder: Path) -> None:
    """A name deleted again and again stays one entry; millions of names stay 4,096 files."""
    store = FolderStore.open(folder, Unsynced())
    for number in range(1, 31):
        assert upload(store, "again", perft(1))[1].version == number
        remove(store, "again")
    path = folder / "deleted" / f"{record_file('again')[:3]}.json"
    assert json.loads(path.read_text()) == {"again": {"highest": 30}}
    for number in range(1500):
        assert upload(store, f"name-{number}", perft(1))[1].version == 1
        remove(store, f"name-{number}")
    files = list((folder / "deleted").iterdir())
    assert {len(path.stem) for path in files} == {3} and sum(path.stat().st_size for path in files) < 40 * 1600
    assert store.adapters() == [] and not list((folder / "names").iterdir())
    store = reopened(store, folder)
    assert [upload(store, f"name-{n}", perft(1))[1].version for n in (0, 777, 1500)] == [2, 2, 1]
    assert verify_folder(folder) == []
    store.close()


def test_a_damaged_file_of_deleted_names_is_named_and_gives_no_number(store: Store, folder: Path) -> None:
    upload(store, "a", perft(1))
    remove(store, "a")
    path = folder / "deleted" / f"{record_file('a')[:3]}.json"
    for damage in (b"{", b'{"a": {"highest": "1"}}', b'{"a": {"highest": 1, "more": 2}}'):
        path.write_bytes(damage)
        with pytest.raises(StoreUnusableError, match=f"{path} is damaged: .*restore it from a copy"):
            upload(store, "a", perft(1))
        assert len(verify_folder(folder)) == 1 and f"deleted/{path.name}" in verify_folder(folder)[0]
    assert store.get("a") is None and bytes_of(folder) == 0


class Unsynced(Disk):
    """Does without the syncs, which take most of the time."""

    def sync_file(self, path: Path) -> None: ...

    def sync_folder(self, path: Path) -> None: ...


def test_the_keys_come_with_the_version_in_one_commit(folder: Path) -> None:
    """Whatever a crash leaves, the version is never there without them."""
    disk = Recording()
    store = FolderStore.open(folder, disk)
    for name, content, keys in (("a", perft(1), ("one",)), ("a", perft(2), ("two",)), ("a", perft(1), None)):
        disk.records.clear()
        assert upload(store, name, content, allowed_keys=keys)[0].allowed_keys == keys
        assert [json.loads(raw)["allowed_keys"] for raw in disk.records] == [None if keys is None else list(keys)]
    assert upload(store, "a", perft(3))[0].allowed_keys is None and numbers(store, "a") == [1, 2, 3]
    store.close()


class Recording(Disk):
    """Keeps every record that is written."""

    def __init__(self) -> None:
        self.records: list[bytes] = []

    def write(self, path: Path, data: bytes) -> None:
        if path.parent.name == "names":
            self.records.append(data)
        super().write(path, data)


def test_a_staged_folder_can_be_let_go(store: Store, folder: Path) -> None:
    staged = store.stage()
    assert staged.is_dir() and not list(staged.iterdir()) and staged != store.stage()
    perft(1).write(staged)
    store.discard(staged)
    store.discard(staged)
    assert len(list((folder / "staging").iterdir())) == 1
    for outside in (folder, folder / "staging", folder / "blobs" / "x"):
        with pytest.raises(AssertionError):
            store.discard(outside)


def test_a_name_is_never_part_of_a_path(store: Store, folder: Path) -> None:
    for name in ("../../out", "a/b", "ü" * 300, ".", ""):
        upload(store, name, perft(1))
    assert verify_folder(folder) == [] and len(list((folder / "names").iterdir())) == 5
    assert not (folder.parent / "out").exists()


def test_the_secret_is_made_once_and_is_nobody_elses(store: Store, folder: Path) -> None:
    path = folder / "secret"
    assert path.read_bytes() == store.secret and len(store.secret) == 32 and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert any("found mode 644, expected 600" in problem for problem in verify_folder(folder))
    again = reopened(store, folder)
    assert again.secret == store.secret and verify_folder(folder) == []
    again.close()
    path.write_bytes(b"short")
    with pytest.raises(StoreUnusableError, match="found 5 bytes, expected 32; remove the file"):
        FolderStore.open(folder)
    path.unlink()
    again = FolderStore.open(folder)
    assert again.secret not in (store.secret, b"short")
    again.close()


def test_a_second_store_on_the_folder_is_refused(store: Store, folder: Path) -> None:
    upload(store, "a", perft(1))
    with pytest.raises(StoreLockedError, match=r"is open in process \d+, expected no other process: stop"):
        FolderStore.open(folder)
    program = (
        f"from adapters.store import FolderStore; from pathlib import Path; FolderStore.open(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "StoreLockedError" in done.stderr and "is open in process" in done.stderr
    upload(store, "a", perft(2))
    assert numbers(store, "a") == [1, 2] and verify_folder(folder) == []
    store.close()
    FolderStore.open(folder).close()


def test_a_forked_child_does_not_keep_the_folder(store: Store, folder: Path) -> None:
    """An engine that outlives its killed server for a moment must not keep the next one out; nor let others in."""
    (reading, writing), (awaiting, telling) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(telling, b".")
        os.read(reading, 1)
        os._exit(0)
    assert os.read(awaiting, 1) == b"."
    with pytest.raises(StoreLockedError):
        FolderStore.open(folder)
    upload(store, "a", perft(1))
    again = reopened(store, folder)
    assert numbers(again, "a") == [1] and os.waitpid(child, os.WNOHANG) == (0, 0), "the child was there all along"
    again.close()
    os.close(writing)
    os.waitpid(child, 0)
    for descriptor in (reading, awaiting, telling):
        os.close(descriptor)


def test_a_store_that_cannot_be_opened_is_not_left_locked(store: Store, folder: Path) -> None:
    store.close()
    good = (folder / "STORE.json").read_text()
    (folder / "STORE.json").write_text("{")
    with pytest.raises(StoreUnusableError, match=r"STORE\.json is damaged: .*restore it"):
        FolderStore.open(folder)
    (folder / "STORE.json").write_text(good)
    FolderStore.open(folder).close()


@pytest.mark.parametrize("found", [3, 0, -1])
def test_another_schema_is_refused_before_anything_is_touched(store: Store, folder: Path, found: int) -> None:
    store.close()
    (folder / "STORE.json").write_text(json.dumps({"schema": found, "floor": 0, "new": True}))
    (folder / "staging" / "theirs").mkdir()
    with pytest.raises(StoreSchemaError, match=f"found schema {found}, expected 2: use .* version of the server"):
        FolderStore.open(folder)
    assert (folder / "staging" / "theirs").is_dir() and f"found schema {found}" in verify_folder(folder)[0]


def test_an_older_schema_is_migrated(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    (folder / "STORE.json").write_text('{"schema": 0, "floor": 7}')
    migrated: list[Path] = []

    def migrate(layout: Any, disk: Disk) -> None:
        migrated.append(layout.root)

    monkeypatch.setitem(opening.MIGRATIONS, 0, migrate)
    again = FolderStore.open(folder)
    assert migrated == [folder] and json.loads((folder / "STORE.json").read_text()) == {"schema": 2, "floor": 7}
    assert upload(again, "a", perft(1))[1].version == 8
    again.close()


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusableError, match="found no folder, expected an empty one or a store"):
        FolderStore.open(tmp_path / "file")
    with pytest.raises(StoreUnusableError, match="Not a directory"):
        FolderStore.open(tmp_path / "file" / "store")
    with pytest.raises(StoreUnusableError, match=r"found file and no STORE\.json, expected an empty folder or a store"):
        FolderStore.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_store_without_its_heart_is_refused_and_left_alone(store: Store, folder: Path) -> None:
    upload(store, "a", perft(1))
    store.close()
    (folder / "STORE.json").rename(folder.parent / "kept")
    with pytest.raises(StoreUnusableError, match=r"found \w+/[0-9a-f.json]+ and no STORE\.json"):
        FolderStore.open(folder)
    (folder.parent / "kept").rename(folder / "STORE.json")
    (folder / "names").rename(folder.parent / "names")
    with pytest.raises(StoreUnusableError, match="names: missing, while there are blobs"):
        FolderStore.open(folder)
    assert bytes_of(folder) == perft(1).size


def test_a_store_may_lie_deep_and_at_a_mount_point(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    (folder / "lost+found").mkdir(parents=True)
    store = FolderStore.open(folder)
    upload(store, "a", perft(1))
    assert verify_folder(folder) == []
    store.close()
    FolderStore.open(tmp_path / "x" / "y").close()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda raw: raw[:-5],
    "empty": lambda raw: b"",
    "active": lambda raw: raw.replace(b'"active": 1', b'"active": 2'),
    "highest": lambda raw: raw.replace(b'"highest": 1', b'"highest": 0'),
    "unknown key": lambda raw: raw.replace(b'"active"', b'"more": 1, "active"'),
    "name": lambda raw: raw.replace(b'"name": "a"', b'"name": "b"'),
    "digest": lambda raw: raw.replace(perft(1).digest.encode(), b"../" * 20),
    "number": lambda raw: raw.replace(b'"version": 1', b'"version": "1"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_nothing_is_removed(store: Store, folder: Path, damage: str) -> None:
    upload(store, "a", perft(1))
    store.close()
    path = folder / "names" / record_file("a")
    broken = DAMAGES[damage](path.read_bytes())
    assert broken != path.read_bytes()
    path.write_bytes(broken)
    with pytest.raises(StoreUnusableError, match=f"the record {path} is damaged: .*restore it from a copy"):
        FolderStore.open(folder)
    assert bytes_of(folder) == perft(1).size
    assert len(verify_folder(folder)) == 1 and path.name in verify_folder(folder)[0]


def test_a_record_moved_away_as_told_gives_no_number_again(store: Store, folder: Path) -> None:
    for seed in (1, 2, 3):
        upload(store, "a", perft(seed))
    store.close()
    path = folder / "names" / record_file("a")
    path.write_bytes(b"")
    with pytest.raises(StoreUnusableError, match=r'raise "floor" in STORE\.json to at least the highest'):
        FolderStore.open(folder)
    path.unlink()
    (folder / "STORE.json").write_text('{"schema": 1, "floor": 3}')
    again = FolderStore.open(folder)
    assert upload(again, "a", perft(1))[1].version == 4
    again.close()


def lose(blob: Path) -> None:
    shutil.rmtree(blob)


def lose_a_file(blob: Path) -> None:
    (blob / "adapter_config.json").unlink()


def shorten(blob: Path) -> None:
    (blob / "adapter_model.safetensors").write_bytes(b"x")


def flip_a_bit(blob: Path) -> None:
    weights = blob / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def change_the_config(blob: Path) -> None:
    config = blob / "adapter_config.json"
    config.write_bytes(config.read_bytes().replace(b'"bottleneck": 1', b'"bottleneck": 2'))


@pytest.mark.parametrize("damage", [lose, lose_a_file, shorten, flip_a_bit, change_the_config])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_blob_damaged_in_an_open_store_is_mended_by_the_same_content(
    store: Store, folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    upload(store, "a", perft(1))
    damage(store.folder(perft(1).digest))
    assert verify_folder(folder) != []
    upload(store, name, perft(1, "told differently"))
    assert verify_folder(folder) == [] == store.problems
    assert store.bytes_used() == bytes_of(folder) and not list((folder / "trash").iterdir())


def test_a_whole_blob_stays_as_it_is(store: Store, folder: Path) -> None:
    """Also where the same content is described in other words."""
    upload(store, "a", perft(1))
    blob = store.folder(perft(1).digest)
    before = blob.stat().st_ino
    upload(store, "b", perft(1, "told differently"))
    assert blob.stat().st_ino == before and (blob / "adapter_config.json").read_bytes() == perft(1).config


class NoMoves(Disk):
    """Moves nothing into blobs/ while `broken`."""

    broken = False

    def step(self, operation: str, path: Path) -> None:
        if self.broken and operation == "move" and path.parent.name == "blobs":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_a_blob_removed_while_an_upload_is_compared_with_it_is_not_damaged(
    store: Store, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner was deleted; what another upload puts there meanwhile is whole, and may be in use."""
    upload(store, "a", perft(1))
    staged = store.stage()
    given = perft(1).write(staged)

    def compare(*_: Any, **__: Any) -> bool:
        remove(store, "a")
        raise FileNotFoundError

    monkeypatch.setattr("adapters.store.folder.blobs.cmp", compare)
    prepared = store.prepare(given, perft(1).digest)
    upload(store, "b", perft(1))
    blob = store.folder(perft(1).digest)
    before = blob.stat().st_ino
    store.add("c", given, perft(1).digest, "PERFT", activate=True, prepared=prepared)
    assert blob.stat().st_ino == before and not [each for each in caplog.records if each.levelname == "ERROR"]
    store.discard(staged)


def test_mending_that_fails_is_told_and_can_be_tried_again(folder: Path) -> None:
    disk = NoMoves()
    store = FolderStore.open(folder, disk)
    upload(store, "a", perft(1))
    flip_a_bit(store.folder(perft(1).digest))
    disk.broken = True
    with pytest.raises(StoreUnusableError):
        upload(store, "a", perft(1))
    assert store.problem(perft(1).digest) is not None and store.bytes_used() == bytes_of(folder) == 0
    disk.broken = False
    upload(store, "a", perft(1))
    assert store.problems == [] == verify_folder(folder) and store.bytes_used() == bytes_of(folder)
    store.close()


@pytest.mark.parametrize("damage", [lose, lose_a_file, shorten])
@pytest.mark.parametrize("mend", ["upload", "delete"])
def test_a_blob_that_is_not_whole_is_reported_and_the_others_serve(
    store: Store, folder: Path, damage: Callable[[Path], None], mend: str
) -> None:
    upload(store, "a", perft(1))
    upload(store, "b", perft(2))
    before = table(store)
    damage(store.folder(perft(1).digest))
    again = reopened(store, folder)
    assert len(again.problems) == 1 and again.problems[0].startswith(f"a@1: blobs/{perft(1).digest}: ")
    assert again.problem(perft(1).digest) is not None and again.problem(perft(2).digest) is None
    assert table(again) == before and again.bytes_used() == perft(2).size
    found = verify_folder(folder)
    assert found and all("(a@1): " in problem for problem in found)
    if mend == "upload":
        assert upload(again, "a", perft(1))[1:] == (again.adapters()[0].versions[0], False)
        assert table(again) == before
    else:
        remove(again, "a")
    assert again.problems == [] and again.bytes_used() == bytes_of(folder) and verify_folder(folder) == []
    again.close()


def test_verify_names_every_problem(store: Store, folder: Path) -> None:
    """Each fault on its own line; what a crash leaves is no fault."""
    for seed, name in ((1, "a"), (2, "b"), (3, "c")):
        upload(store, name, perft(seed))
    upload(store, "d", lora())
    (store.stage() / "half").write_text("")
    (folder / "blobs" / ("0" * 64)).mkdir()
    (folder / "names" / "x.json.tmp").write_text("")
    assert verify_folder(folder) == []
    weights = store.folder(perft(1).digest) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (store.folder(perft(2).digest) / "extra").write_text("")
    record = folder / "names" / record_file("c")
    record.write_bytes(record.read_bytes().replace(rb"\"bottleneck\": 1", rb"\"bottleneck\": 2"))
    (store.folder(lora().digest) / "adapter_config.json").write_bytes(b'{"peft_type": "LORA"}')
    for unknown in ("at-the-root", "names/notes.txt", "blobs/notes.txt"):
        (folder / unknown).write_text("")
    found = "\n".join(verify_folder(folder))
    for expected in (
        "at-the-root: not part of a store",
        "names/notes.txt: not part",
        "blobs/notes.txt: not part",
        f"{perft(1).digest} (a@1): the files' digest is ",
        f"{perft(2).digest} (b@1): found adapter_config.json, adapter_model.safetensors, extra, expected",
        f"{perft(3).digest} (c@1): c@1: the record's configuration is not that of the blob",
        f"{lora().digest} (d@1): the files' digest is ",
        f"{lora().digest} (d@1): d@1: the record's configuration",
    ):
        assert expected in found
    assert len(found.splitlines()) == 8


def test_verify_of_no_store(tmp_path: Path) -> None:
    assert verify_folder(tmp_path) == [f"{tmp_path}: not a store: STORE.json is missing"]
    assert verify_folder(tmp_path / "none") == [f"{tmp_path / 'none'}: not a store: STORE.json is missing"]
    assert not list(tmp_path.iterdir())


def test_an_old_store_opens_with_every_field(tmp_path: Path) -> None:
    """stores/v1 was written by schema 1 and stays as it is; v1.expected.json says what is in it."""
    folder = shutil.copytree(OLD / "v1", tmp_path / "v1")
    store = FolderStore.open(folder)
    expected = json.loads((OLD / "v1.expected.json").read_text())
    found = [json.loads(record.model_dump_json()) for record in store.adapters()]
    assert [version.pop("base") for record in found for version in record["versions"]] == [None] * 5
    assert found == expected["records"]
    assert store.bytes_used() == expected["bytes_used"] and store.secret == bytes(range(32)) and store.problems == []
    assert verify_folder(folder) == []
    assert upload(store, "new", perft(9))[1].version == expected["floor"] + 1
    store.finish_delete("pirate", 4)
    assert verify_folder(folder) == []
    store.close()


def test_a_store_of_this_schema_opens_with_every_field(tmp_path: Path) -> None:
    """stores/v2 was written by schema 2 and stays as it is; v2.expected.json says what is in it."""
    folder = shutil.copytree(OLD / "v2", tmp_path / "v2")
    (folder / "secret").chmod(0o600)
    assert verify_folder(folder) == []
    store = FolderStore.open(folder)
    expected = json.loads((OLD / "v2.expected.json").read_text())
    assert [json.loads(record.model_dump_json()) for record in store.adapters()] == expected["records"]
    assert store.bytes_used() == expected["bytes_used"] and store.problems == []
    for name, (highest, keys) in expected["deleted"].items():
        record = upload(store, name, perft(5))[0]
        assert (record.active, record.allowed_keys) == (highest + 1, None if keys is None else tuple(keys))
    assert upload(store, "new", perft(9))[1].version == 1
    store.finish_delete("pirate", 2)
    assert verify_folder(folder) == []
    store.close()
