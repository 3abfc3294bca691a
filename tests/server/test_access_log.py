"""The access log: one line per request, as text or JSON, with nothing in it that a client could make up."""

import io
import json
import logging
from typing import Any

import pytest

from server.middleware.access_log import AccessLog, LogFormat, RequestFacts

FACTS = RequestFacts("poet", 3, 12, 34)


def written(log_format: LogFormat, **changes: object) -> str:
    stream = io.StringIO()
    values = {
        "request_id": "r-1",
        "label": "team-a",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "seconds": 0.1234567,
        "facts": FACTS,
    }
    AccessLog(log_format, stream).write(**(values | changes))  # type: ignore[arg-type]
    return stream.getvalue()


def test_json_is_one_object_a_line() -> None:
    line = written("json")
    assert line.count("\n") == 1
    values = json.loads(line)
    assert values.pop("time").startswith("20") and values.pop("message") == "request"
    assert values == {
        "request_id": "r-1",
        "label": "team-a",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "adapter": "poet",
        "version": 3,
        "prompt_tokens": 12,
        "generation_tokens": 34,
        "seconds": 0.123457,
    }


def test_text_has_the_same_in_one_line() -> None:
    line = written("text")
    assert line.endswith(
        " request request_id=r-1 label=team-a method=POST path=/v1/completions status=200 adapter=poet version=3"
        " prompt_tokens=12 generation_tokens=34 seconds=0.123457\n"
    )


def test_what_is_not_known_is_null_or_left_out() -> None:
    nothing = {"label": None, "path": None, "status": 404, "facts": RequestFacts()}
    values = json.loads(written("json", **nothing))
    assert values["label"] is None and values["path"] is None and values["adapter"] is None
    assert "label" not in written("text", **nothing) and "adapter" not in written("text", **nothing)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_method_nobody_knows_is_not_repeated(log_format: LogFormat) -> None:
    line = written(log_format, method="X status=200\ninjected")
    assert line.count("\n") == 1 and "injected" not in line and "OTHER" in line


def test_two_logs_do_not_write_to_each_other_and_nothing_goes_to_the_root(caplog: pytest.LogCaptureFixture) -> None:
    first, second = io.StringIO(), io.StringIO()
    with caplog.at_level(logging.DEBUG):
        logs = AccessLog("text", first), AccessLog("json", second)
        logs[0].write("r", None, "GET", "/health", 200, 0.0, RequestFacts())
    assert first.getvalue().count("\n") == 1 and not second.getvalue() and not caplog.records


def test_what_a_library_adds_to_every_record_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's logger does so once it is imported."""
    make = logging.getLogRecordFactory()

    def with_more(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.name_of_the_process = "MainProcess"
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", with_more)
    assert "name_of_the_process" not in json.loads(written("json"))
