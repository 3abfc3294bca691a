"""Owns that a line of the log is a line: what a client wrote cannot look like one of ours. Standard library only.

Invariant: once installed, no message of any logger in the process, and no line of a traceback, contains a character
that is not printable; a traceback's lines are indented, so that none begins as a line of the log does.
"""

import logging
import traceback
from collections.abc import Callable
from typing import Any

from perft.reading import printable

INDENT = "  "
ACCESS_LOG_OF_UVICORN = "uvicorn.access"
"""Its formatter needs the arguments of each record, which uvicorn has quoted."""

RecordFactory = Callable[..., logging.LogRecord]


def escape_records() -> None:
    """From now on every record of this process is escaped, whoever logs it. Call it once what a start prints, in many
    lines, is printed."""
    made = logging.getLogRecordFactory()
    if not isinstance(made, _EscapingFactory):
        logging.setLogRecordFactory(_EscapingFactory(made))


def log_as(library: str, name: str) -> None:
    """Have what is logged under `name` written as what `library` logs, from its level on, and warnings in any case."""
    theirs, ours = logging.getLogger(library), logging.getLogger(name)
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = theirs.propagate  # some library gives the root logger a handler: every line twice
        ours.setLevel(min(theirs.getEffectiveLevel(), logging.WARNING))


class _EscapingFactory:
    """Makes records as `made` does, and escapes them."""

    def __init__(self, made: RecordFactory) -> None:
        self.made = made

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.made(*args, **kwargs)
        if record.name == ACCESS_LOG_OF_UVICORN:
            return record
        try:
            text = record.getMessage()
        except Exception:  # logging reports a message that does not fit its arguments
            return record
        if not text.isprintable():
            record.msg, record.args = printable(text), None
        if record.exc_info is not None and record.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()
            record.exc_text = "\n".join(INDENT + printable(line) for line in lines)
        return record
