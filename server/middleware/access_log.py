"""Owns the access log: one line per request, written when its response has ended; what an open console
asks again and again has one a minute.

Invariant: it never contains a key, a prompt or an answer, nor unchecked text of a client: the path is the route's
template, the adapter the resolved one.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

from pythonjsonlogger.json import JsonFormatter

from server.inference.request_context import RequestFacts
from server.settings.model import LogFormat

ACCESS_LOGGER = "perft.access"
POLL_LOGGED_EVERY_S = 60.0
MAX_POLLS = 1024
"""Clients, keys and routes that are remembered; more only cost lines."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(frozen=True)
class AccessRecord:
    """One line. path: the route's template (None: no route). status: 499 if the client left before the response."""

    request_id: str
    label: str | None
    method: str
    path: str | None
    status: int
    adapter: str | None
    version: int | None
    prompt_tokens: int | None
    generation_tokens: int | None
    seconds: float


class AccessLog:
    """Writes one record per request to a stream, as text (`key=value`) or JSON."""

    def __init__(self, log_format: LogFormat = "text", stream: IO[str] | None = None) -> None:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(_formatter(log_format))
        self._logger = logging.Logger(ACCESS_LOGGER, logging.INFO)
        self._logger.addHandler(handler)

    def write(
        self,
        request_id: str,
        label: str | None,
        method: str,
        path: str | None,
        status: int,
        seconds: float,
        facts: RequestFacts,
    ) -> AccessRecord:
        """Log one request that has ended."""
        known = method if method in _METHODS else "OTHER"
        record = AccessRecord(
            request_id=request_id,
            label=label,
            method=known,
            path=path,
            status=status,
            seconds=round(seconds, 6),
            **asdict(facts),
        )
        self._logger.info("request", extra=asdict(record))
        return record


class Polls:
    """Which successful requests of open consoles leave no line: all but the first in POLL_LOGGED_EVERY_S of each
    client, key and route. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged: dict[tuple[str | None, ...], float] = {}

    def is_repeated(self, client: str | None, label: str | None, route: str) -> bool:
        """Whether that client's requests for the route, with that key, have a line already."""
        who, now = (client, label, route), self._clock()
        if now - self._logged.get(who, -POLL_LOGGED_EVERY_S) < POLL_LOGGED_EVERY_S:
            return True
        if len(self._logged) >= MAX_POLLS:
            self._logged.clear()
        self._logged[who] = now
        return False


class _TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00+0000 request request_id=... status=200`; unknown fields are left out."""

    def format(self, record: logging.LogRecord) -> str:
        values = {name: getattr(record, name) for name in AccessRecord.__dataclass_fields__}
        shown = (f"{name}={value}" for name, value in values.items() if value is not None)
        return " ".join([self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), record.getMessage(), *shown])


class _JsonFormatter(JsonFormatter):
    """Our fields and no others: what a library adds to every log record of the process is left out."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        known = {"message", "time", "timestamp", *AccessRecord.__dataclass_fields__}
        return {name: value for name, value in log_data.items() if name in known}


def _formatter(log_format: LogFormat) -> logging.Formatter:
    if log_format == "text":
        return _TextFormatter()
    return _JsonFormatter("{message}", style="{", timestamp=True, rename_fields={"timestamp": "time"})
