"""What every store does, wherever it is: names and versions as docs/api.md has them, nothing lost, nothing unknown."""

import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.store import UNCHANGED, AdapterRecord, BaseRecord, FolderStore, Keys, Room, Store, VersionRecord
from adapters.store.log.bucket import Bucket
from tests.store.places import Place, Shared
from tests.store_contents import lora, perft, remove, table, upload

BASE = BaseRecord(fingerprint=None, hidden_size=8, num_layers=1, moe_layers=(0,), num_experts=4, top_k=2)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    opened = place.open()
    yield opened
    opened.close()


def again(store: Store, place: Place) -> Store:
    store.close()
    return place.open()


def numbers(store: Store, name: str) -> list[int]:
    record = store.get(name)
    return [] if record is None else [version.version for version in record.versions]


def test_an_uploaded_version_is_there_with_all_that_was_given(store: Store, place: Place) -> None:
    content, before = perft(1, "a description"), int(time())
    record, version, created = upload(store, "pirate", content)
    expected = VersionRecord(
        version=1, digest=content.digest, kind="PERFT", config=content.config.decode(), size_bytes=content.size,
        created=version.created, state="ready",
    )  # fmt: skip
    assert created and version == expected and before <= version.created <= time()
    assert record == AdapterRecord(
        name="pirate", active=1, allowed_keys=None, pinned=False, highest=1, versions=(version,)
    )
    reopened = again(store, place)
    for each in (store, reopened):
        assert each.get("pirate") == record and each.adapters() == [record] and each.get("other") is None
    folder = reopened.fetch(content.digest)
    assert folder == reopened.folder(content.digest)
    assert (folder / "adapter_config.json").read_bytes() == content.config
    assert (folder / "adapter_model.safetensors").read_bytes() == content.weights
    assert reopened.bytes_used() == content.size == place.blob_bytes()
    assert reopened.holds(content.digest) and reopened.problem(content.digest) is None
    reopened.close()


def test_versions_count_up_and_only_the_wanted_one_becomes_active(store: Store) -> None:
    upload(store, "a", perft(1), activate=False)
    assert store.adapters()[0].active is None
    assert upload(store, "a", perft(2))[0].active == 2
    assert upload(store, "a", perft(3), activate=False)[0].active == 2
    assert numbers(store, "a") == [1, 2, 3]
    assert upload(store, "b", perft(4))[1].version == 1, "each name has its own numbers"


@pytest.mark.parametrize("activate", [False, True])
def test_the_same_content_again_is_the_version_that_is_there(store: Store, place: Place, activate: bool) -> None:
    first = upload(store, "a", perft(1))[1]
    upload(store, "a", perft(2))
    record, version, created = upload(store, "a", perft(1, "told differently"), activate)
    assert (version, created, record.active, record.highest) == (first, False, 1 if activate else 2, 2)
    assert place.blob_bytes() == perft(1).size + perft(2).size


def test_one_content_under_two_names_is_kept_once(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    assert "b's own" in upload(store, "b", perft(1, "b's own"))[1].config
    assert store.bytes_used() == perft(1).size == place.blob_bytes()
    remove(store, "a")
    assert store.bytes_used() == place.blob_bytes() == perft(1).size
    remove(store, "b")
    assert store.bytes_used() == place.blob_bytes() == 0 and not store.holds(perft(1).digest)
    assert not store.folder(perft(1).digest).exists()


def test_a_readme_is_dropped_and_a_lora_kept_byte_by_byte(store: Store) -> None:
    staged = store.stage()
    (staged / "README.md").write_text("read me")
    version = store.add("a", lora().write(staged), lora().digest, "LORA", activate=True)[1]
    assert version.config.encode() == lora().config and version.kind == "LORA" and not staged.exists()
    assert sorted(path.name for path in store.fetch(version.digest).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_activation(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    assert store.update("a", active=1).active == 1 and store.update("a", active=None).active is None
    assert store.update("a", active=2).active == 2
    for name, version in (("a", 3), ("b", 1), ("b", None)):
        with pytest.raises(KeyError):
            store.update(name, active=version)
    store.start_delete("a", 1)
    with pytest.raises(ValueError, match="a@1 is being deleted, expected a ready version"):
        store.update("a", active=1)
    reopened = again(store, place)
    record = reopened.get("a")
    assert record is not None and record.active == 2
    reopened.close()


def test_a_version_drains_across_a_restart_and_then_goes(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    with pytest.raises(ValueError, match="a@1 is ready, expected draining"):
        store.finish_delete("a", 1)
    store.start_delete("a", 2)
    reopened = again(store, place)
    record = reopened.get("a")
    assert record is not None and record.active is None
    assert [version.state for version in record.versions] == ["ready", "draining"]
    assert reopened.finish_delete("a", 2) == reopened.get("a")
    assert numbers(reopened, "a") == [1] and place.blob_bytes() == perft(1).size
    assert upload(reopened, "a", perft(3))[1].version == 3, "a number is not given twice"
    reopened.close()


def test_a_name_made_again_is_as_private_as_it_was(store: Store, place: Place) -> None:
    upload(store, "a", perft(1), allowed_keys=("x",))
    upload(store, "a", perft(2))
    remove(store, "a")
    assert store.get("a") is None
    reopened = again(store, place)
    record, version, _ = upload(reopened, "a", perft(1))
    assert (version.version, record.allowed_keys) == (3, ("x",))
    remove(reopened, "a")
    assert upload(reopened, "a", perft(1), allowed_keys=None)[0].allowed_keys is None
    reopened.close()


def test_a_name_being_deleted_lives_on_with_what_is_added_meanwhile(store: Store) -> None:
    upload(store, "a", perft(1))
    store.update("a", pinned=True)
    store.start_delete("a", None)
    record, version, _ = upload(store, "a", perft(1))
    assert (version.version, record.pinned) == (2, False)
    assert store.finish_delete("a", 1) == store.get("a") and store.holds(perft(1).digest)


def test_the_base_of_old_versions_is_recorded_once(store: Store) -> None:
    upload(store, "a", perft(1))
    assert store.adopt("a", [1], BASE).versions[0].base == BASE
    other = BASE.model_copy(update={"hidden_size": 9})
    assert store.adopt("a", [1], other).versions[0].base == BASE


def test_a_check_sees_what_there_is_by_then_and_can_refuse(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    seen: list[Room] = []

    class FullError(Exception):
        pass

    def refuse(room: Room) -> None:
        seen.append(room)
        raise FullError

    before = table(store)
    staged = perft(2).write(store.stage())
    with pytest.raises(FullError):
        store.add("b", staged, perft(2).digest, "PERFT", activate=True, check=refuse)
    for change in (store.update, lambda name, check: store.start_delete(name, None, check=check)):
        with pytest.raises(FullError):
            change("a", check=refuse)
    assert table(store) == before and not staged.exists() and place.blob_bytes() == perft(1).size
    assert [(room.names, room.bytes_used, room.bytes_more) for room in seen] == [
        (1, perft(1).size, perft(2).size), (1, perft(1).size, 0), (1, perft(1).size, 0),
    ]  # fmt: skip
    assert [room.record is not None for room in seen] == [False, True, True]


def test_threads(store: Store, place: Place) -> None:
    """Writers of different names and of one, while others read."""
    contents, failures, done = [perft(seed) for seed in range(4)], [], threading.Event()

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    def write(name: str) -> None:
        for content in contents:
            upload(store, name, content)
            upload(store, "shared", content)
        remove(store, name, 1)

    def read() -> None:
        while not done.is_set():
            assert all(record.versions for record in store.adapters()) and store.bytes_used() >= 0

    reader = guarded(read)
    writers = [guarded(lambda name=name: write(name)) for name in "abc"]  # type: ignore[misc]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failures, failures
    assert numbers(store, "shared") == [1, 2, 3, 4] and numbers(store, "a") == [2, 3, 4]
    assert store.bytes_used() == place.blob_bytes()


NAMES, SEEDS = st.sampled_from("abc"), st.integers(0, 3)
KEYS = st.just(UNCHANGED) | st.none() | st.lists(st.sampled_from("xyz"), max_size=2).map(tuple)


class Alike(RuleBasedStateMachine):
    """Random changes on a folder and on two servers of a shared store, in turn: all three say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory()
        root = Path(self.temporary.name)
        self.one = FolderStore.open(root / "one")
        self.place = Shared(Bucket("memory:///"), root / "caches")
        self.servers = [self.place.open(), self.place.open()]
        self.turn = 0

    def teardown(self) -> None:
        for store in (self.one, *self.servers):
            store.close()
        self.temporary.cleanup()

    def both(self, change: Any) -> None:
        """The same change on both, with the same result or the same refusal."""
        self.turn += 1
        results = [self.outcome(change, store) for store in (self.one, self.servers[self.turn % 2])]
        assert results[0] == results[1]

    @staticmethod
    def outcome(change: Any, store: Store) -> Any:
        try:
            found = change(store)
        except (KeyError, ValueError) as error:
            return repr(error)
        records = found if isinstance(found, tuple) else (found,)
        return [
            each.model_dump(exclude={"created": True, "versions": {"__all__": {"created"}}})
            if isinstance(each, AdapterRecord | VersionRecord) else each
            for each in records
        ]  # fmt: skip

    @rule(name=NAMES, seed=SEEDS, described=st.booleans(), activate=st.booleans(), keys=KEYS)
    def add(self, name: str, seed: int, described: bool, activate: bool, keys: Keys) -> None:
        content = perft(seed, "described" if described else None)
        self.both(lambda store: upload(store, name, content, activate, keys))

    @rule(name=NAMES, number=st.integers(1, 6), keys=KEYS, pinned=st.booleans())
    def update(self, name: str, number: int, keys: Keys, pinned: bool) -> None:
        self.both(lambda store: store.update(name, active=number))
        self.both(lambda store: store.update(name, allowed_keys=keys, pinned=pinned))

    @rule(name=NAMES, number=st.none() | st.integers(1, 6), keys=KEYS)
    def start_delete(self, name: str, number: int | None, keys: Keys) -> None:
        self.both(lambda store: store.start_delete(name, number, keys))

    @rule(name=NAMES, number=st.integers(1, 6))
    def finish_delete(self, name: str, number: int) -> None:
        self.both(lambda store: store.finish_delete(name, number))

    @rule()
    def open_again(self) -> None:
        self.servers[0].close()
        self.servers[0] = self.place.open()

    @invariant()
    def same(self) -> None:
        for store in self.servers:
            store.catch_up()
            assert table(store) == table(self.one) and store.bytes_used() == self.one.bytes_used()
        assert self.place.blob_bytes() == self.one.bytes_used()


Alike.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestAlike = Alike.TestCase
