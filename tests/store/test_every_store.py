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
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.store import UNCHANGED, AdapterRecord, BaseRecord, Keys, Room, Store, VersionRecord
from adapters.store.log.bucket import Bucket
from tests.store.places import InFolder, Place, Shared
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
    assert reopened.holds(content.digest) and reopened.problem(content.digest) is None and place.problems() == []
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
    assert place.blob_bytes() == perft(1).size + perft(2).size and place.problems() == []


def test_one_content_under_two_names_is_kept_once(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    assert "b's own" in upload(store, "b", perft(1, "b's own"))[1].config
    assert store.bytes_used() == perft(1).size == place.blob_bytes() and place.problems() == []
    remove(store, "a")
    assert store.bytes_used() == place.blob_bytes() == perft(1).size and place.problems() == []
    remove(store, "b")
    assert store.bytes_used() == place.blob_bytes() == 0 and not store.holds(perft(1).digest)
    assert not store.folder(perft(1).digest).exists()


def test_a_readme_is_dropped_and_a_lora_kept_byte_by_byte(store: Store) -> None:
    staged = store.stage()
    inner = staged / "unpacked"
    inner.mkdir()
    (inner / "README.md").write_text("read me")
    version = store.add("a", lora().write(inner), lora().digest, "LORA", activate=True)[1]
    store.discard(staged)
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


def test_the_folder_given_is_consumed_whatever_comes_of_it(store: Store) -> None:
    upload(store, "a", perft(1))
    there, broken = perft(1).write(store.stage()), perft(2).write(store.stage())
    store.add("a", there, perft(1).digest, "PERFT", activate=True)
    (broken / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        store.add("a", broken, perft(2).digest, "PERFT", activate=True)
    assert not there.exists() and not broken.exists() and numbers(store, "a") == [1]


def test_an_update_is_one_commit(store: Store, place: Place) -> None:
    for number in (1, 2):
        upload(store, "a", perft(number))
    store.start_delete("a", 1)
    before = store.get("a")
    with pytest.raises(ValueError, match="a@1 is being deleted"):
        store.update("a", active=1, allowed_keys=["one"], pinned=True)
    with pytest.raises(KeyError):
        store.update("a", active=3, pinned=True)
    assert store.get("a") == before
    record = store.update("a", active=None, allowed_keys=["one"], pinned=True)
    assert (record.active, record.allowed_keys, record.pinned) == (None, ("one",), True)
    assert store.update("a", active=2).pinned


def test_update_changes_only_what_is_given(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    assert store.update("a", allowed_keys=["one", "two"]).allowed_keys == ("one", "two")
    assert store.update("a", pinned=True).allowed_keys == ("one", "two")
    record = store.update("a", allowed_keys=())
    assert (record.allowed_keys, record.pinned, record.active) == ((), True, 1)
    store = again(store, place)
    assert store.get("a") == record
    assert store.update("a", allowed_keys=None, pinned=False).allowed_keys is None
    with pytest.raises(KeyError):
        store.update("b", pinned=True)
    store.close()


def test_a_version_drains_across_a_restart_and_then_goes(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    with pytest.raises(ValueError, match="a@1 is ready, expected draining"):
        store.finish_delete("a", 1)
    store.start_delete("a", 1)
    store = again(store, place)
    assert [v.state for v in store.adapters()[0].versions] == ["draining", "ready"]
    assert store.fetch(perft(1).digest).is_dir(), "what drains still runs"
    left = store.finish_delete("a", 1)
    assert left is not None and (left.active, left.highest, [v.version for v in left.versions]) == (2, 2, [2])
    assert store.bytes_used() == perft(2).size == place.blob_bytes() and place.problems() == []
    with pytest.raises(KeyError):
        store.finish_delete("a", 1)
    with pytest.raises(KeyError):
        store.start_delete("a", 1)
    store.close()


def test_deleting_the_highest_version_does_not_free_its_number(store: Store, place: Place) -> None:
    upload(store, "a", perft(1))
    upload(store, "a", perft(2), activate=False)
    remove(store, "a", 2)
    store = again(store, place)
    assert upload(store, "a", perft(2))[1].version == 3
    store.close()


def test_the_active_version_that_drains_is_active_no_more(store: Store) -> None:
    upload(store, "a", perft(1))
    assert store.start_delete("a", 1).active is None
    assert store.finish_delete("a", 1) is None and store.get("a") is None


@pytest.mark.parametrize("opened_again", [False, True])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_name_made_again_is_as_private_as_it_was_and_no_more(
    store: Store, place: Place, opened_again: bool, is_gone: bool
) -> None:
    """While it is being deleted, and after."""
    upload(store, "a", perft(1))
    store.update("a", allowed_keys=["one"], pinned=True)
    assert store.start_delete("a", None).allowed_keys == ("one",)
    if is_gone:
        assert store.finish_delete("a", 1) is None
    store = again(store, place) if opened_again else store
    record = upload(store, "a", perft(2))[0]
    assert (record.allowed_keys, record.pinned, record.active, record.highest) == (("one",), False, 2, 2)
    left = store.get("a") if is_gone else store.finish_delete("a", 1)
    assert left is not None and left.allowed_keys == ("one",) and not left.pinned
    store.update("a", allowed_keys=None)
    remove(store, "a")
    assert upload(store, "a", perft(3))[0].allowed_keys is None, "it was open when it was deleted"
    store.close()


@pytest.mark.parametrize("keys", [None, (), ("two",), ("one", "two")])
def test_a_name_made_again_has_the_keys_that_are_given(
    store: Store, place: Place, keys: tuple[str, ...] | None
) -> None:
    upload(store, "a", perft(1), allowed_keys=("one",))
    remove(store, "a")
    assert upload(store, "a", perft(1), allowed_keys=keys)[0].allowed_keys == keys
    store = again(store, place)
    record = store.get("a")
    assert record is not None and record.allowed_keys == keys
    store.close()


def test_a_name_of_which_a_version_stays_keeps_what_it_has(store: Store) -> None:
    upload(store, "a", perft(1))
    upload(store, "a", perft(2))
    store.update("a", allowed_keys=["one"], pinned=True)
    store.start_delete("a", 1)
    record = upload(store, "a", perft(3))[0]
    assert (record.allowed_keys, record.pinned) == (("one",), True)


def test_a_closed_store_changes_nothing(store: Store) -> None:
    upload(store, "a", perft(1))
    store.close()
    with pytest.raises(AssertionError, match="closed"):
        store.update("a", active=None)
    assert store.adapters()[0].active == 1


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
    """Writers of different names and of one, while others read. A change under way is nothing wrong with a folder."""
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
            assert isinstance(place, Shared) or place.problems() == []

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
    assert store.bytes_used() == place.blob_bytes() and place.problems() == []


NAMES, SEEDS = st.sampled_from("ab"), st.integers(0, 3)
KEYS = st.just(UNCHANGED) | st.none() | st.lists(st.sampled_from("xyz"), max_size=2).map(tuple)


class Alike(RuleBasedStateMachine):
    """Random changes in a dictionary, on a folder, and on two servers of a shared store in turn: all say the same, and
    both places are sound whenever they are opened again."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory()
        root = Path(self.temporary.name)
        self.folder = InFolder(root / "one")
        self.one = self.folder.open()
        self.place = Shared(Bucket("memory:///"), root / "caches")
        self.servers = [self.place.open(), self.place.open()]
        self.turn = 0
        self.names: dict[str, dict[str, Any]] = {}
        self.deleted: dict[str, tuple[int, Keys]] = {}

    def teardown(self) -> None:
        for store in (self.one, *self.servers):
            store.close()
        self.temporary.cleanup()

    def both(self, change: Any) -> Any:
        """The same change on both; the result, or the refusal (a str), which is the same."""
        self.turn += 1
        results = [self.outcome(change, store) for store in (self.one, self.servers[self.turn % 2])]
        assert results[0] == results[1]
        return results[0]

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

    @initialize()
    def begin(self) -> None:
        """With names: most changes are of one that is there."""
        for name, seed in (("a", 0), ("a", 1), ("b", 0)):
            self.add(name, seed, False, True, UNCHANGED)

    @rule(name=NAMES, seed=SEEDS, described=st.booleans(), activate=st.booleans(), keys=KEYS)
    def add(self, name: str, seed: int, described: bool, activate: bool, keys: Keys) -> None:
        content = perft(seed, "described" if described else None)
        highest, kept = self.deleted.get(name, (0, None))
        new = {"active": None, "highest": highest, "keys": kept, "pinned": False, "versions": {}}
        model = self.names.setdefault(name, new)
        ready = [n for n, version in model["versions"].items() if version == (content.digest, "ready")]
        number = ready[0] if ready else model["highest"] + 1
        if not any(state == "ready" for _, state in model["versions"].values()):
            model["pinned"] = False
        model["keys"] = model["keys"] if keys is UNCHANGED else keys
        model["versions"].setdefault(number, (content.digest, "ready"))
        model["highest"] = max(number, model["highest"])
        model["active"] = number if activate else model["active"]
        _, version, created = self.both(lambda store: upload(store, name, content, activate, keys))
        assert (version["version"], created) == (number, not ready)

    def numbers(self, name: str, state: str) -> list[int]:
        versions = self.names.get(name, {"versions": {}})["versions"]
        return [number for number, (_, found) in versions.items() if found == state]

    @rule(name=NAMES, number=st.integers(1, 6))
    def activate(self, name: str, number: int) -> None:
        found = self.both(lambda store: store.update(name, active=number))
        if number in self.numbers(name, "ready"):
            self.names[name]["active"] = number
        else:
            assert isinstance(found, str)

    @rule(name=NAMES, keys=KEYS, pinned=st.booleans())
    def update(self, name: str, keys: Keys, pinned: bool) -> None:
        found = self.both(lambda store: store.update(name, allowed_keys=keys, pinned=pinned))
        if (model := self.names.get(name)) is not None:
            model |= {"keys": model["keys"] if keys is UNCHANGED else keys, "pinned": pinned}
        else:
            assert isinstance(found, str)

    @rule(name=NAMES, number=st.none() | st.integers(1, 6), keys=KEYS)
    def start_delete(self, name: str, number: int | None, keys: Keys) -> None:
        found = self.both(lambda store: store.start_delete(name, number, keys))
        chosen = [n for n in self.names.get(name, {"versions": {}})["versions"] if number in (None, n)]
        if not chosen:
            assert isinstance(found, str)
            return
        model = self.names[name]
        model["keys"] = model["keys"] if keys is UNCHANGED else keys
        model["versions"] |= {n: (model["versions"][n][0], "draining") for n in chosen}
        model["active"] = None if model["active"] in chosen else model["active"]

    @rule(name=NAMES, number=st.integers(1, 6))
    def finish_delete(self, name: str, number: int) -> None:
        is_draining = number in self.numbers(name, "draining")
        found = self.both(lambda store: store.finish_delete(name, number))
        if not is_draining:
            assert isinstance(found, str)
            return
        del self.names[name]["versions"][number]
        if not self.names[name]["versions"]:
            gone = self.names.pop(name)
            self.deleted[name] = (gone["highest"], gone["keys"])

    @rule(name=NAMES, keys=KEYS)
    def remove(self, name: str, keys: Keys) -> None:
        """To its end, which random steps seldom reach: the next upload makes the name again."""
        versions = list(self.names.get(name, {"versions": {}})["versions"])
        self.start_delete(name, None, keys)
        for number in versions:
            self.finish_delete(name, number)

    @rule()
    def open_again(self) -> None:
        for store in (self.one, self.servers[0]):
            store.close()
        self.one, self.servers[0] = self.folder.open(), self.place.open()
        assert self.folder.problems() == self.place.problems() == []

    @invariant()
    def same(self) -> None:
        found = {
            record.name: {
                "active": record.active, "highest": record.highest, "keys": record.allowed_keys,
                "pinned": record.pinned, "versions": {v.version: (v.digest, v.state) for v in record.versions},
            }
            for record in self.one.adapters()
        }  # fmt: skip
        assert found == self.names
        digests = {digest for model in self.names.values() for digest, _ in model["versions"].values()}
        assert {path.name for path in (self.folder.folder / "blobs").iterdir()} == digests
        for store in self.servers:
            store.catch_up()
            assert table(store) == table(self.one) and store.bytes_used() == self.one.bytes_used()
        assert self.place.blob_bytes() == self.folder.blob_bytes() == self.one.bytes_used()


Alike.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAlike = Alike.TestCase
