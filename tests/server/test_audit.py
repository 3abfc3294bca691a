"""The audit log: one whole line per change, on the disk before anybody is answered."""

import errno
import json
import os
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from server.api.error_responses import as_api_error
from server.auth.keys import Caller
from server.errors import AuditLogError, StartError
from server.registry import audit
from server.registry.audit import AuditLog

ADMIN = Caller("admin", True)
NOON = datetime(2026, 1, 31, 12, 0, 0, 5000, tzinfo=timezone(timedelta(hours=2)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_what_when_and_from_where(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    log = AuditLog(path, clock=lambda: NOON)
    caller = Caller("admin", True, client="10.0.0.7", request_id="r1")
    log.record("upload", caller, name="poet", version=3, digest="ab", status=201)
    log.record("patch", Caller(None, True), name="poet", outcome="done")
    assert lines(path) == [
        {
            "time": "2026-01-31T10:00:00.005Z",
            "action": "upload",
            "label": "admin",
            "client": "10.0.0.7",
            "request_id": "r1",
            "name": "poet",
            "version": 3,
            "digest": "ab",
            "status": 201,
        },
        {
            "time": "2026-01-31T10:00:00.005Z",
            "action": "patch",
            "label": None,
            "client": None,
            "request_id": None,
            "name": "poet",
            "outcome": "done",
        },
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_time_is_now(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    AuditLog(tmp_path / "log").record("delete", ADMIN)
    found = datetime.fromisoformat(lines(tmp_path / "log")[0]["time"])
    assert before - timedelta(milliseconds=1) <= found <= datetime.now(UTC)


def test_nothing_a_client_says_can_begin_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    AuditLog(path).record(
        "upload", Caller("admin", True, client="a\nb"), name='x"}\n{"action": "delete"}\r\x1b[2J\u2028\udc00'
    )
    assert path.read_bytes().count(b"\n") == 1 and len(lines(path)) == 1
    assert all(32 <= byte < 127 for byte in path.read_bytes().rstrip(b"\n"))


def test_it_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    synced: list[int] = []
    monkeypatch.setattr(audit.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    log = AuditLog(path)
    log.record("upload", ADMIN)
    assert synced[-1] == path.stat().st_size and len(synced) == 2, "the folder once, then the line"
    log.record("upload", ADMIN)
    assert len(synced) == 3 and synced[-1] == path.stat().st_size


def test_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        log = AuditLog(path)
        log.record("upload", ADMIN)
        log.close()
        log.record("patch", ADMIN)
    assert [line["action"] for line in lines(path)] == ["upload", "patch"] * 2


def test_a_rotation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AuditLog(path)
    log.record("upload", ADMIN)
    path.rename(tmp_path / "log.1")
    log.record("patch", ADMIN)
    path.unlink()
    log.record("delete", ADMIN)
    assert [line["action"] for line in lines(tmp_path / "log.1")] == ["upload"]
    assert [line["action"] for line in lines(path)] == ["delete"]
    os.truncate(path, 0)
    log.record("upload", ADMIN)
    assert [line["action"] for line in lines(path)] == ["upload"]


def test_a_line_that_a_crash_tore_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"action": "upl')
    AuditLog(path).record("patch", ADMIN)
    torn, whole = path.read_text().splitlines()
    assert torn == '{"action": "upl' and json.loads(whole)["action"] == "patch"


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AuditLog(path)
    workers = [
        Thread(target=lambda n=n: [log.record("upload", ADMIN, name=f"{n}-{i}" * 50) for i in range(20)])
        for n in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({line["name"] for line in lines(path)}) == 160


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_change_that_cannot_be_recorded_is_refused(
    call: str, failure: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "log")
    log.open()

    def fail(*_: Any) -> int:
        raise OSError(failure, os.strerror(failure))

    with monkeypatch.context() as patched:
        patched.setattr(audit.os, call, fail)
        with pytest.raises(AuditLogError) as refused:
            log.record("upload", ADMIN)
    assert (as_api_error(refused.value).status, refused.value.code) == (507, "storage_full")
    assert os.strerror(failure) in refused.value.message and str(tmp_path) not in refused.value.message
    log.record("patch", ADMIN)


def test_half_a_line_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "log")
    log.open()
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(audit.os, "write", lambda file, data: real(file, data[:5]))
        with pytest.raises(AuditLogError, match="only a part"):
            log.record("upload", ADMIN)
    log.record("patch", ADMIN)
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["action"] == "patch"


def test_a_log_that_cannot_be_written_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "file" / "log", tmp_path / "link", tmp_path / "fifo"):
        with pytest.raises(StartError, match=r"--audit-log .*cannot be written"):
            AuditLog(path).open()


def test_an_existing_log_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    path.chmod(0o640)
    AuditLog(path).record("upload", ADMIN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
