"""An upload's way in: what is taken, what memory and disk it costs, and that a refused one ends over a real socket."""

import asyncio
import errno
import io
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.uploads import form as form_module
from server.uploads import receive
from server.uploads.form import MultipartForm, PartRule, malformed
from tests.hostile import FAMILIES, good, good_uploads, send, send_upload
from tests.hostile.attack import BOUNDARY, END, FORM, Attack, Pause, Setting, Upload, begun, form, part, whole
from tests.hostile.local_app import BASE, SETTING, LocalApp, answer, run, setting_for
from tests.hostile.sending import LIMIT_S
from tests.hostile.streams import FOR_EVER_S, endless
from tests.server.processes import wait_until

MIB = 1024 * 1024
LARGE = Setting(BASE, "tiny-moe", 64 * MIB, timeout_s=3600, idle_timeout_s=3600)


@pytest.fixture
def app(tmp_path: Path) -> LocalApp:
    return LocalApp(tmp_path, SETTING)


def sent(**fields: bytes) -> Upload:
    """The sound form with more or other fields."""
    config, weights = good.files(SETTING).values()
    return whole(form({"name": b"poet", "config": config, "weights": weights} | fields))


SPELLED = {
    True: (b"true", b"1", b"yes", b"on", b"TRUE", b"True", b" true\n"),
    False: (b"false", b"0", b"no", b"off", b"False"),
}


@pytest.mark.parametrize(
    ("field", "expected"),
    [({}, True), *(({"activate": text}, value) for value, texts in SPELLED.items() for text in texts)],
)
def test_activate(app: LocalApp, field: dict[str, bytes], expected: bool) -> None:
    assert run(app, sent(**field)).answer["activate"] is expected


def test_all_ways_in_give_one_digest(app: LocalApp) -> None:
    digests = {run(app, upload).answer["digest"] for upload in good_uploads(SETTING).values()}
    assert len(digests) == 1


@pytest.mark.parametrize("size", [1, 7, 100, 65536])
def test_the_pieces_do_not_matter(app: LocalApp, size: int) -> None:
    """Wherever the body is cut into pieces, boundaries included."""
    body = b"".join(piece for piece in sent().pieces if isinstance(piece, bytes))
    cut = Upload([body[i : i + size] for i in range(0, len(body), size)])
    assert run(app, cut).answer["digest"] == run(app, sent()).answer["digest"]


def test_data_that_looks_like_a_boundary(tmp_path: Path) -> None:
    """Kept to the byte, however the blocks fall."""
    data = (f"\r\n--{BOUNDARY}"[:-1].encode() + b"\r\r\n-" + b"\n\r\n--") * 50
    body = form({"file": data})
    rules = {"file": PartRule(10**6, malformed_of("too large"), "kept")}
    for size in (1, 2, 3, 11, 64, len(body)):
        parsed = MultipartForm(BOUNDARY.encode(), rules, tmp_path)
        for begin in range(0, len(body), size):
            parsed.feed(body[begin : begin + size])
        parsed.close()
        assert parsed.is_finished and (tmp_path / "kept").read_bytes() == data
        (tmp_path / "kept").unlink()


def malformed_of(message: str) -> Callable[[], Any]:
    return lambda: malformed(message)


def test_a_block_after_close_is_dropped(tmp_path: Path) -> None:
    """A thread may still bring one when the request is given up."""
    parsed = MultipartForm(BOUNDARY.encode(), {"file": PartRule(100, malformed_of("x"), "kept")}, tmp_path)
    parsed.feed(begun("file") + b"abc" * 20)
    parsed.close()
    parsed.feed(b"more" * 20 + b"\r\n" + END)
    assert not parsed.is_finished and b"more" not in (tmp_path / "kept").read_bytes()


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").symlink_to(tmp_path / "elsewhere")
    parsed = MultipartForm(BOUNDARY.encode(), {"file": PartRule(100, malformed_of("x"), "kept")}, tmp_path)
    with pytest.raises(FileExistsError):
        parsed.feed(begun("file") + b"abc")
    assert not (tmp_path / "elsewhere").exists()


def large_upload(size: int) -> Upload:
    """A form whose weights are that many bytes, made as they are taken."""
    block = bytes(64 * 1024)
    start = part("name", b"poet") + part("config", good.config()) + begun("weights")
    return Upload([start, *[block] * (size // len(block)), b"\r\n" + END])


def test_either_limit_of_time_is_enough(tmp_path: Path) -> None:
    """One long pause within the whole time, and many short ones within the idle time."""
    body = b"".join(piece for piece in sent().pieces if isinstance(piece, bytes))
    pauses = [piece for byte in body[-20:] for piece in (Pause(0.1), bytes([byte]))]
    slow = {(60, 0.1): Upload([body[:-20], Pause(3), body[-20:]]), (0.5, 30): Upload([body[:-20], *pauses])}
    for (timeout_s, idle_timeout_s), upload in slow.items():
        app = LocalApp(tmp_path, Setting(BASE, "tiny-moe", MIB, timeout_s, idle_timeout_s))
        outcome = run(app, upload)
        assert (outcome.status, outcome.answer["error"]["code"]) == (408, "upload_timeout")


@pytest.mark.parametrize("name", FAMILIES["streams"])
def test_the_connection_of_an_unread_body_is_closed(tmp_path: Path, name: str) -> None:
    """Without it the HTTP server would read the rest of the body, however long, to get at the next request."""
    attack = FAMILIES["streams"][name]
    app = LocalApp(tmp_path, setting_for(attack))
    assert run(app, attack.make(app.setting)).headers["connection"] == "close"


def test_the_connection_of_a_whole_upload_is_kept(app: LocalApp) -> None:
    assert "connection" not in run(app, sent()).headers


def test_a_large_upload_is_never_held_in_memory(tmp_path: Path) -> None:
    app = LocalApp(tmp_path, LARGE)
    run(app, large_upload(MIB))
    tracemalloc.start()
    try:
        outcome = run(app, large_upload(48 * MIB))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outcome.status == 400 and outcome.answer["error"]["code"] == "invalid_adapter"
    assert peak < 8 * MIB, f"{peak} bytes for an upload of 48 MiB"


def test_the_loop_goes_on_during_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing, writing and unpacking run in other threads than the loop's."""
    threads: set[str] = set()
    feed, unpack = MultipartForm.feed, receive.extract

    def seen_feed(self: MultipartForm, block: bytes) -> None:
        threads.add(threading.current_thread().name)
        feed(self, block)

    def seen_extract(*arguments: Any) -> list[str]:
        threads.add(threading.current_thread().name)
        return unpack(*arguments)

    monkeypatch.setattr(MultipartForm, "feed", seen_feed)
    monkeypatch.setattr(receive, "extract", seen_extract)
    assert run(LocalApp(tmp_path, SETTING), good_uploads(SETTING)["zip"]).status == 201
    assert threads and all(name.startswith("perft-upload") for name in threads)


class FullFile(io.RawIOBase):
    """A file that cannot be written to."""

    number = errno.ENOSPC

    def __init__(self, descriptor: int, *_: Any, **__: Any) -> None:
        os.close(descriptor)

    def write(self, data: Any) -> int:
        raise OSError(self.number, "no room")


def test_a_full_disk(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_module.os, "fdopen", FullFile)
    for upload in (sent(), good_uploads(SETTING)["tar.gz"]):
        outcome = run(app, upload)
        assert (outcome.status, outcome.answer["error"]["code"]) == (507, "storage_full")
        assert not list(app.folder.iterdir())
    monkeypatch.undo()
    assert run(app, sent()).status == 201


def test_a_disk_full_while_unpacking(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> list[str]:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(receive, "extract", no_room)
    outcome = run(app, good_uploads(SETTING)["zip"])
    assert (outcome.status, outcome.answer["error"]["code"]) == (507, "storage_full")


def test_a_broken_disk(app: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error of the system is not told as a full disk, and leaves nothing behind either."""
    monkeypatch.setattr(FullFile, "number", errno.EIO)
    monkeypatch.setattr(form_module.os, "fdopen", FullFile)
    with pytest.raises(OSError, match="no room"):
        run(app, sent())
    assert not list(app.folder.iterdir())


def test_a_cancelled_upload_closes_its_files(app: LocalApp) -> None:
    async def cancelled() -> None:
        stalled = Upload([part("name", b"poet") + begun("weights") + bytes(3 * MIB), Pause(FOR_EVER_S), END])
        large = LocalApp(app.folder, LARGE)
        task = asyncio.ensure_future(answer(large, stalled))
        while not any(app.folder.rglob("*.safetensors")):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    descriptors = Path("/proc/self/fd").iterdir()
    held = [os.readlink(entry) for entry in descriptors if os.path.lexists(entry)]
    assert not [target for target in held if str(app.folder) in target]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalApp, int]]:
    """The local app behind uvicorn, and its port."""
    app = LocalApp(tmp_path_factory.mktemp("served"), SETTING)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "uvicorn did not start"
    yield app, running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join(LIMIT_S)
    assert not thread.is_alive()


OVER_HTTP = {name: attack for family in ("bodies", "streams") for name, attack in FAMILIES[family].items()}
OVER_HTTP |= {name: attack for family in FAMILIES.values() for name, attack in list(family.items())[::10]}


@pytest.mark.parametrize("name", [name for name in OVER_HTTP if not OVER_HTTP[name].needs_bytes])
def test_attacks_over_a_socket(server: tuple[LocalApp, int], name: str) -> None:
    app, port = server
    attack: Attack = OVER_HTTP[name]
    app.setting = setting_for(attack)
    status, body = send(attack, app.setting, "127.0.0.1", port)
    assert not attack.problems(status, body)
    app.setting = SETTING
    assert send_upload(good_uploads(SETTING)["zip"], "127.0.0.1", port)[0] == 201
    wait_until(lambda: not list(app.folder.iterdir()))


def test_a_refused_body_is_not_taken_to_its_end(server: tuple[LocalApp, int]) -> None:
    """The connection ends: what the client can still send is what the system's buffers hold."""
    _, port = server
    taken = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for piece in endless(part("name", b"poet") + begun("weights")):
            assert isinstance(piece, bytes)
            taken += len(piece)
            yield piece

    status, _ = send_upload(Upload(counted(), FORM), "127.0.0.1", port)
    assert status == 413 and taken < 200 * MIB
