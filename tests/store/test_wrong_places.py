"""A shared store whose place is full, throttled, forbidden, gone, slow, hanging or an hour off: what is refused is
refused whole and says why, nothing is believed of a place that is not there, and every call ends."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StorageFullError, StoreError, StoreUnusableError
from adapters.store import open_store
from adapters.store.log import bounded, bucket, cache
from adapters.store.log.bounded import MOST_HANGING, BoundedCalls
from adapters.store.log.bucket import Bucket
from adapters.store.log.entries import BLOBS, entry_key
from adapters.store.log.shared_folder import SharedFolder
from adapters.store.log.store import LogStore
from tests.server.processes import free_port
from tests.store import wrong_s3
from tests.store.places import Shared
from tests.store.test_log_store import SCRIPT, check_sound, entries, undisturbed
from tests.store.wrong_s3 import Refusal, WrongS3
from tests.store_contents import Content, lora, perft, table, upload
from tests.unit.test_store_crash import fill, small_disk

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def server() -> Iterator[WrongS3]:
    with wrong_s3.wrong_s3() as running:
        yield running


@pytest.fixture
def s3(server: WrongS3) -> WrongS3:
    """The server, which does all right until it is told otherwise."""
    server.refuse_all(None)
    server.clock_off_s, server.overwrites, server.seconds_per_block = 0.0, False, 0.0
    return server


def opened(s3: WrongS3, tmp_path: Path, **options: Any) -> tuple[Shared, LogStore]:
    place = Shared(s3.bucket(), tmp_path / "caches")
    return place, place.open(**options)


REFUSED: list[tuple[Refusal, type[StoreError], str]] = [
    (wrong_s3.FULL, StorageFullError, r"507 .*XMinioStorageFull: Storage backend .*free space there"),
    (wrong_s3.OVER_QUOTA, StorageFullError, r"QuotaExceeded.*raise its quota"),
    (wrong_s3.DENIED, StoreUnusableError, r"AccessDenied: Access Denied: start the server with valid credentials"),
    (wrong_s3.EXPIRED, StoreUnusableError, r"ExpiredToken: .*start the server with valid credentials"),
    (wrong_s3.UNKNOWN_KEY, StoreUnusableError, r"401 .*start the server with valid credentials"),
    (wrong_s3.VANISHED, StoreUnusableError, r"NoSuchBucket: .*create the bucket again"),
    (wrong_s3.SKEWED, StoreUnusableError, r"RequestTimeTooSkewed: .*set this machine's \(NTP\)"),
]


@pytest.mark.parametrize(("refusal", "error", "message"), REFUSED, ids=[each[0].code for each in REFUSED])
def test_a_change_that_is_refused_did_not_happen_and_says_why(
    s3: WrongS3, tmp_path: Path, refusal: Refusal, error: type[StoreError], message: str
) -> None:
    """At once: an answer came, and there is nothing to ask after."""
    place, store = opened(s3, tmp_path, pause=pytest.fail)
    upload(store, "a", perft(1))
    before = table(store)
    s3.refuse_all(refusal, "PUT")
    changes: list[Callable[[LogStore], Any]] = [
        lambda store: store.update("a", pinned=True),
        lambda store: store.start_delete("a", None),
        lambda store: upload(store, "a", perft(2)),
    ]
    for change in changes:
        with pytest.raises(error, match=message) as caught:
            change(store)
        assert "may have been made" not in str(caught.value) and "\n" not in str(caught.value)
    s3.refuse_all(None)
    store.catch_up()
    assert table(store) == before and len(entries(place.objects)) == 1
    upload(store, "a", perft(2))
    assert store.update("a", pinned=True).active == 2
    store.close()
    check_sound(place)


def test_a_bucket_without_credentials_says_which_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what came of asking the machine for its own, which is all that obstore says."""
    for name in [each for each in os.environ if each.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    wanted = (
        r"^opening in the store s3://adapters/x: .*found no credentials, in the environment or of the machine "
        r"\(.*/latest/api/token .*\), expected either: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give .* role"
    )
    with pytest.raises(StoreUnusableError, match=wanted):
        open_store("s3://adapters/x", tmp_path / "cache")
    with pytest.raises(
        StoreUnusableError, match=r"^[^\n]*: set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY$"
    ):
        open_store("az://adapters/x", tmp_path / "cache")


class Patience:
    """A clock that passes only while the store waits to ask again."""

    def __init__(self) -> None:
        self.now = 0.0

    def options(self) -> dict[str, Any]:
        return {"clock": lambda: self.now, "pause": self.wait}

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_a_refusal_after_a_lost_answer_is_no_answer_to_the_first(s3: WrongS3, tmp_path: Path) -> None:
    place, store = opened(s3, tmp_path, **Patience().options())
    upload(store, "a", perft(1))
    answers = iter([Refusal("500 Internal Server Error", "InternalError")])
    s3.refuse = lambda method, path: next(answers, wrong_s3.EXPIRED) if method == "PUT" else None
    with pytest.raises(StoreUnusableError, match=r"ExpiredToken.*may have been made"):
        store.update("a", pinned=True)
    store.close()
    s3.refuse_all(None)
    check_sound(place)


def test_throttled_for_a_while(s3: WrongS3, tmp_path: Path) -> None:
    """Asked again, with longer and longer pauses; each change is made once."""
    patience, pauses = Patience(), list[float]()
    options = patience.options() | {"pause": lambda seconds: (pauses.append(seconds), patience.wait(seconds))}
    place, store = opened(s3, tmp_path, **options)
    left = {"refusals": 3}

    def refuse(method: str, path: str) -> Refusal | None:
        if method != "PUT" or "/log/" not in path or not left["refusals"]:
            return None
        left["refusals"] -= 1
        return wrong_s3.THROTTLED

    s3.refuse = refuse
    upload(store, "a", perft(1))
    assert pauses == [0.2, 0.4, 0.8] and len(entries(place.objects)) == 1
    s3.refuse_all(wrong_s3.THROTTLED, "PUT")
    with pytest.raises(StoreUnusableError, match="SlowDown: Please reduce your request rate") as caught:
        store.update("a", pinned=True)
    assert "may have been made" not in str(caught.value), "a throttled request did nothing"
    s3.refuse_all(None)
    assert store.update("a", allowed_keys=()).pinned is False and len(entries(place.objects)) == 2
    store.close()


def test_a_place_without_conditional_writes_is_refused_by_trying(s3: WrongS3, tmp_path: Path) -> None:
    s3.overwrites = True
    place = Shared(s3.bucket(), tmp_path / "caches")
    with pytest.raises(StoreUnusableError, match=r"overwrites an object .*expected conditional writes.*If-None-Match"):
        place.open()
    assert not list(place.objects.list("")), "nothing is left there"


@pytest.mark.parametrize("refusal", [wrong_s3.VANISHED, wrong_s3.EXPIRED, wrong_s3.DENIED], ids=lambda each: each.code)
def test_what_is_gone_or_forbidden_is_not_taken_for_nothing_new(s3: WrongS3, tmp_path: Path, refusal: Refusal) -> None:
    _, store = opened(s3, tmp_path)
    upload(store, "a", perft(1))
    s3.refuse_all(refusal)
    looked = store._log.looked
    with pytest.raises(StoreUnusableError, match=refusal.code):
        store.catch_up()
    assert store._log.looked == looked
    with pytest.raises(StoreUnusableError, match=refusal.code):
        opened(s3, tmp_path)
    s3.refuse_all(None)
    assert store.catch_up().sent > looked
    store.close()


def test_a_place_that_lost_the_log_is_not_taken_for_one_without_news(shared: Shared, tmp_path: Path) -> None:
    """A folder that is not mounted any more, a bucket that was emptied, a log that was restored from an old copy."""
    store, other = shared.open(), shared.open()
    upload(other, "a", perft(1))
    upload(other, "a", perft(2))
    store.catch_up()
    kept = {found.key: shared.objects.get(found.key) or b"" for found in shared.objects.list("log/")}
    shared.objects.remove(entry_key(2))
    with pytest.raises(StoreUnusableError, match=rf"found no {entry_key(2)}.*still mounted.*not emptied"):
        store.catch_up()
    other.close()
    other = shared.open()
    other.update("a", pinned=True)
    with pytest.raises(StoreUnusableError, match=rf"found another {entry_key(2)}.*start all its servers again"):
        store.catch_up()
    other.close()
    shared.objects.remove(entry_key(2))
    shared.objects.create(entry_key(2), kept[entry_key(2)])
    store.catch_up()
    store.close()


def test_a_new_store_that_is_unmounted(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    store = LogStore.open(SharedFolder(folder), tmp_path / "cache")
    store.catch_up()
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    with pytest.raises(StoreUnusableError, match=r"found no STORE\.json"):
        store.catch_up()
    store.close()


def test_a_file_that_takes_longer_than_the_time_for_an_answer(
    s3: WrongS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow line brings it in pieces, each within that time."""
    monkeypatch.setattr(bucket, "_FILES", bucket._FILES | {"timeout": "1s"})
    monkeypatch.setattr(bucket, "BLOCK", WrongS3.BLOCK)
    content = lora(weights=os.urandom(8 * WrongS3.BLOCK))
    _, store = opened(s3, tmp_path)
    upload(store, "a", content)
    store._cache.remove(content.digest)
    s3.seconds_per_block = 0.2
    assert (store.fetch(content.digest) / "adapter_model.safetensors").read_bytes() == content.weights
    store.close()


# Hanging


def hanging_threads(folder: Path) -> int:
    """Of this folder: other tests' folders may hang for good."""
    return sum(thread.name == f"perft-store-call {folder}" for thread in threading.enumerate())


def test_a_shared_folder_that_hangs(tmp_path: Path) -> None:
    """Like a server of NFS that is gone: who opens a file is kept. Every call ends, and threads do not add up."""
    folder = tmp_path / "shared"
    place = SharedFolder(folder)
    store = LogStore.open(place, tmp_path / "cache")
    upload(store, "a", perft(1))
    patience_s, place._calls._patience_s = place._calls._patience_s, 0.2  # only while nothing can answer
    hanging = folder / entry_key(2)
    os.mkfifo(hanging)
    for _ in range(MOST_HANGING):
        with pytest.raises(StoreUnusableError, match=r"no answer in 0\.2 s; check the mount and its server"):
            store.catch_up()
    with pytest.raises(StoreUnusableError, match=rf"{MOST_HANGING} earlier calls hang"):
        store.update("a", pinned=True)
    assert hanging_threads(folder) == MOST_HANGING
    heal(hanging)
    while hanging_threads(folder):
        time.sleep(0.01)
    place._calls._patience_s = patience_s
    assert store.update("a", pinned=True).pinned
    store.close()
    check_sound(Shared(SharedFolder(folder), tmp_path / "caches"))


def heal(fifo: Path) -> None:
    """Let all go on who wait for a writer of a FIFO that is there no more."""
    writer = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fifo.unlink()
    os.close(writer)


@pytest.mark.parametrize("patience_s", [5.0, 10.0])
def test_a_long_call_is_let_go_on_while_it_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """One every 9 seconds, of a time that passes only while the caller waits."""
    now, steps, gone_on = [0.0], threading.Semaphore(0), threading.Semaphore(0)
    left, wait = iter(range(4)), bounded.wait

    def pass_time(calls: Any, seconds: float) -> Any:
        now[0] += 9.0
        steps.release()
        gone_on.acquire()
        return wait(calls, 0 if next(left, None) is not None else None)

    def work(alive: Callable[[], None]) -> str:
        for _ in range(5):
            steps.acquire()
            if patience_s > 9.0:
                alive()
            gone_on.release()
        return "done"

    monkeypatch.setattr(bounded.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bounded, "wait", pass_time)
    if patience_s > 9.0:
        assert BoundedCalls(patience_s).run(work) == "done" and now[0] == 45.0
    else:
        with pytest.raises(TimeoutError, match="no answer in 5 s"):
            BoundedCalls(patience_s).run(work)
        steps.release(4)


# Full disks


def test_a_full_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    with small_disk(place) as real:
        folder, ballast = place / "shared", place / "ballast"
        store = LogStore.open(SharedFolder(folder), tmp_path / "cache")
        upload(store, "a", perft(1))
        before = table(store)
        if real:
            fill(ballast)
        else:
            monkeypatch.setattr(os, "fsync", no_space)
        for change in (lambda: upload(store, "a", perft(2)), lambda: store.update("a", pinned=True)):
            with pytest.raises(StorageFullError, match=r"No space left on device.*nothing changed: free space there"):
                change()
        store.catch_up()
        assert table(store) == before, "it is still followed"
        ballast.unlink(missing_ok=True)
        monkeypatch.undo()
        assert upload(store, "a", perft(2))[0].active == 2
        store.close()
        check_sound(Shared(SharedFolder(folder), tmp_path / "caches"))


def no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def large(number: int) -> Content:
    return lora(weights=bytes([number]) * 80_000)


def test_a_cache_on_a_full_disk_gives_up_what_was_not_used_for_the_longest_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound of its own it fills the disk; then what is needed takes the place of what is not."""
    place, small = Shared(Bucket("memory:///"), tmp_path / "caches"), tmp_path / "small"
    small.mkdir()
    with small_disk(small) as real:
        if not real:
            used = lambda: sum(path.stat().st_size for path in small.rglob("*") if path.is_file())  # noqa: E731
            usage = lambda path: shutil._ntuple_diskusage(2**20, used(), 2**20 - used())  # type: ignore[attr-defined] # noqa: E731
            monkeypatch.setattr(cache.shutil, "disk_usage", usage)
        store = LogStore.open(place.objects, small / "cache")
        numbers = range(20)
        for number in numbers:
            upload(store, "a", large(number))
        for number in (*numbers, 0):
            folder = store.fetch(large(number).digest)
            assert (folder / "adapter_model.safetensors").read_bytes() == large(number).weights
        kept = [large(number).digest for number in numbers if store.folder(large(number).digest).exists()]
        assert 5 < len(kept) < 15 and large(0).digest in kept and large(19).digest in kept
        with ExitStack() as in_use:
            for digest in kept:
                in_use.enter_context(store.used(digest))
            if real:
                fill(small / "ballast")
                with pytest.raises(StorageFullError, match=r"--adapter-cache on another disk"):
                    store.fetch(large(1).digest)
            assert all(store.folder(digest).exists() for digest in kept), "what is in use stays"
        store.fetch(large(1).digest)
        store.close()


# Damage


def flip_a_bit(weights: Path) -> None:
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda weights: shutil.rmtree(weights.parent)])
def test_a_copy_that_was_damaged_on_this_machine_is_brought_again(
    shared: Shared, damage: Callable[[Path], object]
) -> None:
    store = shared.open()
    upload(store, "a", perft(1))
    weights = store.fetch(perft(1).digest) / "adapter_model.safetensors"
    assert not store.renew(perft(1).digest)
    damage(weights)
    assert store.renew(perft(1).digest) and weights.read_bytes() == perft(1).weights
    store.close()


def test_what_was_damaged_where_it_is_kept_is_named_and_mended_by_an_upload_on_any_server(
    shared: Shared, tmp_path: Path
) -> None:
    one, two = shared.open(), shared.open()
    upload(one, "a", perft(1))
    two.catch_up()
    (key,) = [found.key for found in shared.objects.list(BLOBS) if found.key.endswith(".safetensors")]
    other = tmp_path / "other"
    other.write_bytes(bytes(len(perft(1).weights)))
    shared.objects.remove(key)
    shared.objects.put_file(key, other)
    for _ in range(2):
        with pytest.raises(StoreUnusableError, match=rf"{key.rpartition('/')[0]}/: the files' digest is .*upload the"):
            two.fetch(perft(1).digest)
    assert not two.holds(perft(1).digest) and two.problem(perft(1).digest) is not None
    assert one.holds(perft(1).digest), "it has a whole copy of its own"
    assert upload(one, "b", perft(1))[0].active == 1
    two.catch_up()
    for store in (one, two):
        assert store.holds(perft(1).digest) and store.problem(perft(1).digest) is None
        assert (store.fetch(perft(1).digest) / "adapter_model.safetensors").read_bytes() == perft(1).weights
        store.close()
    assert shared.problems() == []
    check_sound(shared)


# Clocks


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_bucket_whose_clock_differs_by_an_hour_says_so(s3: WrongS3, tmp_path: Path, hours: int) -> None:
    """It refuses every signature, at the start and when a clock jumps later on; nothing is lost by that."""
    place, store = opened(s3, tmp_path)
    upload(store, "a", perft(1))
    s3.clock_off_s = hours * HOUR_S
    for call in (store.catch_up, lambda: store.update("a", pinned=True), place.open):
        with pytest.raises(StoreUnusableError, match=r"RequestTimeTooSkewed: .*set this machine's \(NTP\)"):
            call()
    s3.clock_off_s = 0.0
    store.catch_up()
    assert store.update("a", pinned=True).pinned and len(entries(place.objects)) == 2
    store.close()
    check_sound(place)


@pytest.mark.parametrize("jump", [HOUR_S, -HOUR_S, 30 * 24 * HOUR_S])
def test_wall_clocks_decide_nothing(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """One that jumps with every change, an hour or a month: what comes out is the same, and nothing is swept early."""
    states, real, jumps = undisturbed(tmp_path), time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (jump if next(jumps) % 2 else -jump))
    store, other = shared.open(), shared.open()
    for change, expected in zip(SCRIPT, states[1:], strict=True):
        change(store)
        other.catch_up()
        assert table(store) == table(other) == expected
    staged = perft(3).write(store.stage())
    prepared = store.prepare(staged, perft(3).digest)
    assert other.sweep() == 0, "an upload under way is not swept by a machine with another clock"
    store.add("c", staged, perft(3).digest, "PERFT", activate=True, prepared=prepared)
    assert store.holds(perft(3).digest)
    monkeypatch.undo()
    for each in (store, other):
        each.close()
    check_sound(shared)
