"""The shared store: many writers, one order; killed, cut off, answered twice or not at all; and what it refuses."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreError, StoreSchemaError, StoreUnusableError
from adapters.store import Store
from adapters.store.log import log
from adapters.store.log.bucket import Bucket
from adapters.store.log.contents import ORPHAN_AGE_S
from adapters.store.log.entries import Entry, entry_key
from adapters.store.log.objects import Objects
from adapters.store.log.store import LogStore
from tests.store.faults import Faulty, KilledError
from tests.store.places import Shared
from tests.store_contents import perft, remove, table, upload

SCRIPT: list[Callable[[Store], Any]] = [
    lambda store: upload(store, "a", perft(1)),
    lambda store: upload(store, "a", perft(2), activate=False),
    lambda store: upload(store, "b", perft(1, "b's own")),
    lambda store: store.update("a", active=2),
    lambda store: store.update("b", allowed_keys=("x",), pinned=True),
    lambda store: store.start_delete("a", 1),
    lambda store: store.finish_delete("a", 1),
    lambda store: store.start_delete("b", None),
    lambda store: store.finish_delete("b", 1),
    lambda store: upload(store, "b", perft(1)),
    lambda store: upload(store, "a", perft(2), activate=True),
]


@pytest.fixture
def memory(tmp_path: Path) -> Shared:
    return Shared(Bucket("memory:///"), tmp_path / "caches")


def undisturbed(tmp_path: Path) -> list[Any]:
    """The states before, between and after the changes of the script."""
    store = Shared(Bucket("memory:///"), tmp_path / "undisturbed").open()
    states = [table(store)]
    for change in SCRIPT:
        change(store)
        states.append(table(store))
    store.close()
    return states


def check_sound(place: Shared) -> None:
    """No gap, no number twice, every content whole, and nothing kept that nobody needs, once it is swept."""
    store = place.open()
    assert all(store.holds(v.digest) for record in store.adapters() for v in record.versions)
    given = [(e.name, v.version, v.digest) for e in entries(place.objects) if e.record for v in e.record.versions]
    assert len({(name, number) for name, number, _ in given}) == len(set(given)), "a number is given once"
    store.sweep(lambda: time.time() + ORPHAN_AGE_S + 1)
    assert store.bytes_used() == place.blob_bytes()
    store.close()


def entries(objects: Objects) -> list[Entry]:
    """All entries; their numbers have no gap."""
    found = [Entry.model_validate_json(objects.get(each.key) or b"") for each in objects.list("log/")]
    assert [entry.number for entry in found] == list(range(1, len(found) + 1))
    return found


def test_four_writers_lose_nothing(shared: Shared) -> None:
    """25 changes each: gapless, every one there, no number given twice."""
    stores, failures = [shared.open() for _ in range(4)], []

    def write(store: LogStore, who: int) -> None:
        try:
            for number in range(5):
                upload(store, "shared", perft(10 * who + number), activate=number % 2 == 0)
                upload(store, f"own-{who}", perft(number))
                store.update("shared", pinned=number % 2 == 0)
                store.update(f"own-{who}", allowed_keys=(str(number),))
                store.update("shared", allowed_keys=(f"{who}-{number}",))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(store, who)) for who, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    record = stores[0].get("shared")
    for store in stores:
        store.catch_up()
        assert table(store) == table(stores[0])
    record = stores[0].get("shared")
    assert record is not None and [v.version for v in record.versions] == list(range(1, 21))
    assert len(entries(shared.objects)) >= 80 and len({entry.id for entry in entries(shared.objects)}) >= 80
    for store in stores:
        store.close()
    check_sound(shared)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_step(tmp_path: Path, moment: str) -> None:
    """Everything acknowledged is there, the change under way whole or not at all, and another server goes on."""
    states = undisturbed(tmp_path)
    step = 0
    while True:
        place = Shared(Bucket("memory:///"), tmp_path / str(step))
        faulty = Faulty(place.objects)

        def kill(operation: str, key: str, step: int = step, faulty: Faulty = faulty) -> None:
            if len(faulty.steps) == step + 1:
                raise KilledError

        setattr(faulty, moment, kill)
        done = 0
        try:
            store = LogStore.open(faulty, tmp_path / f"{step}-killed")
            for change in SCRIPT:
                change(store)
                done += 1
        except KilledError:
            other = place.open()
            found = table(other)
            assert found in (states[done], states[done + 1]), (step, faulty.steps[-1])
            reached = done if found == states[done] else done + 1
            for change in SCRIPT[reached:]:
                change(other)
            assert table(other) == states[-1]
            other.close()
            check_sound(place)
            step += 1
            continue
        assert step > 40, "the script has that many steps at least"
        return


def test_a_lost_answer_is_asked_for_again(memory: Shared) -> None:
    """Whatever is answered with an error although it was made: each change is made once."""
    faulty = Faulty(memory.objects)
    lost = {"count": 0}

    def lose(operation: str, key: str) -> None:
        if operation == "create" and key.startswith("log/") and lost["count"] < 3:
            lost["count"] += 1
            raise OSError("the answer was lost")
        lost["count"] = 0 if operation == "create" else lost["count"]

    faulty.after = lose
    store = LogStore.open(faulty, memory.caches / "a", pause=lambda seconds: None)
    for change in SCRIPT[:6]:
        change(store)
    assert len(entries(memory.objects)) == 6
    store.close()
    check_sound(memory)


def test_another_writer_came_first_while_the_answer_was_lost(memory: Shared) -> None:
    faulty, other = Faulty(memory.objects), memory.open()
    upload(other, "a", perft(1))
    store = LogStore.open(faulty, memory.caches / "b", pause=lambda seconds: None)

    def overtake(operation: str, key: str) -> None:
        if operation == "create" and key == entry_key(2):
            faulty.before = lambda operation, key: None
            other.update("a", pinned=True)
            raise OSError("nothing was sent")

    faulty.before = overtake
    record = store.update("a", allowed_keys=("x",))
    assert (record.pinned, record.allowed_keys) == (True, ("x",))
    assert [entry.number for entry in entries(memory.objects)] == [1, 2, 3]
    store.close()
    other.close()


def test_an_append_that_is_never_answered_says_that_it_may_have_been_made(memory: Shared) -> None:
    faulty, now = Faulty(memory.objects), [0.0]
    store = LogStore.open(
        faulty, memory.caches / "a", clock=lambda: now[0], pause=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    upload(store, "a", perft(1))

    def cut(operation: str, key: str) -> None:
        if operation == "create" or key == entry_key(2):
            raise OSError("no route to host")

    upload(store, "b", perft(2))
    faulty.before = lambda operation, key: cut(operation, key) if operation == "create" else None
    with pytest.raises(StoreUnusableError, match=r"entry 3 .* no answer came in 15 s.*may have been made"):
        store.update("a", pinned=True)
    faulty.before = lambda operation, key: None
    assert store.update("a", allowed_keys=("x",)).pinned is False
    store.close()


def test_a_place_that_cannot_be_reached_changes_nothing(memory: Shared) -> None:
    faulty = Faulty(memory.objects)
    store = LogStore.open(faulty, memory.caches / "a")
    upload(store, "a", perft(1))
    before = table(store)

    def cut(operation: str, key: str) -> None:
        raise OSError("no route to host")

    faulty.before = cut
    for change in (lambda: store.update("a", pinned=True), lambda: upload(store, "a", perft(2)), store.catch_up):
        with pytest.raises(StoreError, match="no route to host"):
            change()
    assert table(store) == before and store.get("a") is not None, "what is known can be read"
    faulty.before = lambda operation, key: None
    assert store.update("a", pinned=True).pinned
    store.close()


def test_a_look_that_found_nothing_newer_counts_from_when_it_was_sent(memory: Shared) -> None:
    now, faulty = [100.0], Faulty(memory.objects)
    store = LogStore.open(faulty, memory.caches / "a", clock=lambda: now[0])
    other = memory.open()
    upload(other, "a", perft(1))

    def slow(operation: str, key: str) -> None:
        now[0] += 7.0

    faulty.after = slow
    look = store.catch_up()
    assert (look.names, store.position) == ({"a"}, 1)
    assert look.sent == 107.0, "the second look was sent when the first had come back, and came at 114"
    other.update("a", pinned=True)
    store.update("a", allowed_keys=("x",))
    assert store.catch_up().names == {"a"}, "what a change of its own found on the way is told too"
    assert store.catch_up().names == set()
    store.close()
    other.close()


def test_a_deleted_content_goes_from_every_cache(memory: Shared) -> None:
    one, two = memory.open(), memory.open()
    upload(one, "a", perft(1))
    two.catch_up()
    folder = two.fetch(perft(1).digest)
    assert folder.is_dir()
    remove(one, "a")
    assert two.catch_up().names == {"a"} and not folder.exists() and memory.blob_bytes() == 0
    with pytest.raises(StoreUnusableError, match="has no files of"):
        two.fetch(perft(1).digest)
    one.close()
    two.close()


def test_a_content_that_was_deleted_while_it_was_uploaded_again_is_there(memory: Shared) -> None:
    one, two = memory.open(), memory.open()
    upload(one, "a", perft(1))
    two.catch_up()
    staged = perft(1).write(two.stage())
    prepared = two.prepare(staged, perft(1).digest)
    assert prepared.upload is None, "the store has it"
    remove(one, "a")
    two.add("b", staged, perft(1).digest, "PERFT", activate=True, prepared=prepared)
    assert one.catch_up().names == {"b"} and (one.fetch(perft(1).digest) / "adapter_config.json").is_file()
    one.close()
    two.close()
    check_sound(memory)


def test_an_upload_that_is_let_go_leaves_nothing(memory: Shared) -> None:
    store = memory.open()
    staged = store.stage()
    inner = staged / "unpacked"
    inner.mkdir()
    store.prepare(perft(1).write(inner), perft(1).digest)
    assert memory.blob_bytes() == perft(1).size
    store.discard(staged)
    assert memory.blob_bytes() == 0 and not staged.exists()
    store.close()


def test_files_that_are_missing_are_told_and_mended_by_the_same_content(memory: Shared) -> None:
    store = memory.open()
    upload(store, "a", perft(1))
    store.close()
    (lost,) = [found.key for found in memory.objects.list("blobs/") if found.key.endswith(".safetensors")]
    memory.objects.remove(lost)
    store = memory.open()
    assert store.problem(perft(1).digest) == "its files are missing" and not store.holds(perft(1).digest)
    _, version, created = upload(store, "a", perft(1))
    assert (version.version, created) == (1, False) and store.holds(perft(1).digest)
    assert (store.fetch(perft(1).digest) / "adapter_model.safetensors").read_bytes() == perft(1).weights
    store.close()
    check_sound(memory)


def test_files_that_were_changed_are_never_served(memory: Shared, tmp_path: Path) -> None:
    store = memory.open()
    upload(store, "a", perft(1))
    store.close()
    (found,) = [found.key for found in memory.objects.list("blobs/") if found.key.endswith(".safetensors")]
    other = tmp_path / "other"
    other.write_bytes(bytes(len(perft(1).weights)))
    memory.objects.remove(found)
    memory.objects.put_file(found, other)
    store = memory.open()
    with pytest.raises(StoreUnusableError, match="it was changed where it is kept"):
        store.fetch(perft(1).digest)
    assert not store.folder(perft(1).digest).exists()
    store.close()


def test_a_start_reads_a_snapshot_and_what_came_after(memory: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "SNAPSHOT_EVERY", 4)
    store = memory.open()
    for change in SCRIPT[:10]:
        change(store)
    upload(store, "c", perft(3))
    remove(store, "c")
    expected = table(store)
    store.close()
    snapshots = [found.key for found in memory.objects.list("snapshot/")]
    assert snapshots == [f"snapshot/{number:012}.json" for number in (4, 8, 12)]
    faulty = Faulty(memory.objects)
    store = LogStore.open(faulty, memory.caches / "b")
    assert table(store) == expected and [key for step, key in faulty.steps if key.startswith("log/")] == [
        entry_key(13), entry_key(14), entry_key(13)
    ]  # fmt: skip
    assert upload(store, "c", perft(3))[1].version == 2, "a snapshot remembers deleted names"
    store.close()
    memory.objects.remove(snapshots[-1])
    memory.objects.create(snapshots[-1], b"{")
    store = memory.open()
    assert store.get("c") is not None, "a damaged snapshot is passed over"
    store.close()


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", None])
def test_a_damaged_entry_stops_and_is_named(memory: Shared, damage: bytes | None) -> None:
    store = memory.open()
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    store.close()
    raw = memory.objects.get(entry_key(1))
    memory.objects.remove(entry_key(1))
    memory.objects.create(entry_key(1), damage if damage is not None else (memory.objects.get(entry_key(2)) or b""))
    with pytest.raises(StoreUnusableError, match=r"log/000000000001\.json"):
        memory.open()
    memory.objects.remove(entry_key(1))
    memory.objects.create(entry_key(1), raw or b"")
    memory.open().close()


class Overwriting(Faulty):
    """A place without conditional writes."""

    def create(self, key: str, data: bytes) -> bool:
        self.inner.remove(key)
        return self.inner.create(key, data)


def test_a_place_without_conditional_writes_is_refused(memory: Shared) -> None:
    with pytest.raises(StoreUnusableError, match="expected conditional writes"):
        LogStore.open(Overwriting(memory.objects), memory.caches / "a")
    assert not list(memory.objects.list("")), "nothing is left there"


def test_another_schema_is_refused(memory: Shared) -> None:
    memory.objects.create("STORE.json", json.dumps({"kind": "log", "schema": 2, "floor": 0}).encode())
    with pytest.raises(StoreSchemaError, match="found schema 2, expected 1"):
        memory.open()


def test_a_folder_store_is_not_taken_for_a_shared_one(tmp_path: Path) -> None:
    from adapters.store import FolderStore
    from adapters.store.log.shared_folder import SharedFolder

    FolderStore.open(tmp_path / "a").close()
    with pytest.raises(StoreUnusableError, match="is not that of a shared store"):
        LogStore.open(SharedFolder(tmp_path / "a"), tmp_path / "cache")


def test_the_cache_is_bounded_and_keeps_what_was_used_last(memory: Shared) -> None:
    size = perft(1).size
    store = LogStore.open(memory.objects, memory.caches / "a", cache_bytes=2 * size + 10)
    for seed in (1, 2, 3):
        upload(store, "a", perft(seed))
    first = store.fetch(perft(1).digest)
    second = store.fetch(perft(2).digest)
    with store.used(perft(1).digest), store.used(perft(2).digest):
        store.fetch(perft(3).digest)
        assert first.exists() and second.exists(), "what is being read stays, whatever the bound"
    store.fetch(perft(1).digest)
    assert sum(store.folder(perft(seed).digest).exists() for seed in (1, 2, 3)) <= 3
    store.close()
    again = LogStore.open(memory.objects, memory.caches / "a", cache_bytes=2 * size + 10)
    assert again.folder(perft(1).digest).exists(), "a cache outlives its server"
    upload(again, "a", perft(4))
    again.fetch(perft(4).digest)
    assert sum(again.folder(perft(seed).digest).exists() for seed in (1, 2, 3, 4)) <= 2
    again.close()


def test_a_cache_has_one_server(memory: Shared) -> None:
    store = LogStore.open(memory.objects, memory.caches / "a")
    with pytest.raises(StoreError, match="is another server's, expected one for each"):
        LogStore.open(memory.objects, memory.caches / "a")
    store.close()
