"""What a client wrote cannot look like a line of the log, whoever logs it."""

import io
import logging
from collections.abc import Iterator

import pytest

from perft.logs import escape_records, log_as
from perft.reading import printable

FORGED = "x\nINFO 01-01 00:00:00 forged"
ODD = [
    "a\nb",
    "a\r\nb",
    "a\x1b[31mb",
    "a\x00b",
    "a\x85b",
    "a\u2028b",
    "a\u202eb",
    "a\u200bb",
    "a\ud800b",
    "a\x7fb",
    "a\tb",
]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a plain handler writes while records are escaped."""
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    escape_records()
    stream, logger = io.StringIO(), logging.getLogger("of.anybody")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # whatever some library made of the root's
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_a_text_is_one_printable_line(text: str) -> None:
    line = printable(text)
    assert line.isprintable() and line[0] == "a" and line[-1] == "b" and "\\" in line


@pytest.mark.parametrize("text", ["", "plain", "Ünïcode 日本", "100 % {x} \\n"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", [*ODD, FORGED], ids=ascii)
def test_a_message_is_one_line_however_it_was_made(stream: io.StringIO, text: str) -> None:
    logger = logging.getLogger("of.anybody")
    logger.warning("found %s", text)
    logger.warning(f"found {text}")
    logger.warning("found %(it)s", {"it": text})
    lines = stream.getvalue().split("\n")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)


@pytest.mark.parametrize("text", [*ODD, FORGED], ids=ascii)
def test_an_exceptions_words_cannot_begin_a_line(stream: io.StringIO, text: str) -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError(text) from error
    except ValueError:
        logging.getLogger("of.anybody").exception("request failed")
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert first == "request failed" and rest and all(line.startswith("  ") and line.isprintable() for line in rest)
    assert "Traceback (most recent call last):" in rest[0]


def test_other_records_are_left_as_they_are(stream: io.StringIO) -> None:
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("of.anybody")
    logger.addFilter(lambda record: records.append(record) is None)
    logger.warning("%d of %s", 3, "four")
    logger.filters.clear()
    assert records[0].args == (3, "four") and stream.getvalue() == "3 of four\n"


def test_it_is_installed_once(stream: io.StringIO) -> None:
    installed = logging.getLogRecordFactory()
    escape_records()
    assert logging.getLogRecordFactory() is installed


@pytest.mark.parametrize("level, shown", [(logging.INFO, ["note", "warning"]), (logging.ERROR, ["warning"])])
def test_what_is_ours_is_logged_as_the_librarys(level: int, shown: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """vLLM configures its own logger only: a note of ours would have no handler, and be lost, or a library's at the
    root, and be there twice."""
    library, ours, stream = logging.getLogger(f"library{level}"), logging.getLogger(f"ours{level}"), io.StringIO()
    library.addHandler(logging.StreamHandler(stream))
    library.setLevel(level)
    library.propagate = False
    for _ in range(2):
        log_as(library.name, ours.name)
    logging.getLogger(f"{ours.name}.module").info("note")
    logging.getLogger(f"{ours.name}.module").warning("warning")
    assert stream.getvalue().splitlines() == shown and not caplog.records
