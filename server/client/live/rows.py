"""Owns the table of `perft top`: a row per adapter, from the API's page and the metrics; its columns and their order.

Invariant: a number that nobody told is None, shown as `-`, and stands last in any order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.schemas import AdapterObject
from server.client.http import AdapterPage
from server.client.live.samples import Change
from server.client.live.sources import ADAPTER_TTFT

Number = float | None


@dataclass(frozen=True)
class Row:
    """One adapter. where: device, host or disk. requests, tokens: per second. ttft: mean seconds. last_used: unix s."""

    name: str
    state: str
    where: str
    rows: Number
    running: Number
    waiting: Number
    requests: Number
    tokens: Number
    ttft: Number
    last_used: Number


@dataclass(frozen=True)
class Order:
    """A column that the table can be sorted by. api: the order to ask the server's page in, so that its first rows are
    there; what only the metrics know is sorted among the adapters that were used last."""

    title: str
    value: Callable[[Row], Any]
    api: str
    largest_first: bool = True


ORDERS = (
    Order("RUN", lambda row: row.running, "-running"),
    Order("WAIT", lambda row: row.waiting, "-last_used"),
    Order("REQ/S", lambda row: row.requests, "-last_used"),
    Order("TOK/S", lambda row: row.tokens, "-last_used"),
    Order("TTFT", lambda row: row.ttft, "-last_used"),
    Order("USED", lambda row: row.last_used, "-last_used"),
    Order("ROWS", lambda row: row.rows, "-rows"),
    Order("NAME", lambda row: row.name, "name", largest_first=False),
)
TITLES = ("NAME", "STATE", "WHERE", "ROWS", "RUN", "WAIT", "REQ/S", "TOK/S", "TTFT", "USED")
NUMBERS = TITLES[3:]
EXPENDABLE = ("USED", "ROWS", "STATE", "REQ/S", "WAIT", "TTFT", "WHERE")
"""What a narrow terminal goes without, first to last."""


def rows_of(page: AdapterPage | None, change: Change | None, search: str) -> list[Row]:
    """The matching adapters of the page and the base, with what the metrics say; without a page the metrics' names."""
    told = _Told(change)
    names = told.running if page is None else told.bases
    rows = [told.row(name, "-", "base" if name in told.bases else "-", None, None, None) for name in names]
    found = [row for row in rows if search.lower() in row.name.lower()]
    return found + [_row(adapter, told) for adapter in (page.data if page else ()) if _matches(adapter, search)]


def in_order(rows: Sequence[Row], order: Order, is_reversed: bool) -> list[Row]:
    """The rows by one column, those of equal value by name, and those without one last."""
    by_name = sorted(rows, key=lambda row: row.name)
    known = [row for row in by_name if order.value(row) is not None]
    known.sort(key=order.value, reverse=order.largest_first != is_reversed)
    return known + [row for row in by_name if order.value(row) is None]


def cells(row: Row, now: float) -> tuple[str, ...]:
    """A row as text, in the order of TITLES. now: unix seconds."""
    return (
        row.name, row.state, row.where, number(row.rows), number(row.running), number(row.waiting),
        number(row.requests), number(row.tokens), seconds(row.ttft),
        "-" if row.last_used is None else age(now - row.last_used),
    )  # fmt: skip


def number(value: Number) -> str:
    """A count or a rate: whole where it is, else with one digit."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def seconds(value: Number) -> str:
    """A duration."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def age(passed: float) -> str:
    """How long ago, in the largest unit that fits; a clock that goes ahead of ours counts as now."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {unit}"
    return f"{max(0.0, passed):.0f} s"


class _Told:
    """What the metrics say of each adapter, by its name."""

    def __init__(self, change: Change | None) -> None:
        self.bases = set(change.new.by("vllm:num_requests_running", "model_name")) if change else set()
        self.running = change.new.by("perft_adapter_requests_running", "adapter") if change else {}
        self._waiting = change.new.by("perft_adapter_requests_waiting", "adapter") if change else {}
        self._requests = change.rates("perft_adapter_requests_total", "adapter") if change else {}
        self._tokens = change.rates("perft_adapter_generation_tokens_total", "adapter") if change else {}
        self._ttft = change.means(ADAPTER_TTFT, "adapter") if change else {}

    def _rate(self, rates: dict[str, float], name: str) -> float | None:
        """A counter that is 0 may be left out, where others of its name are there."""
        return rates.get(name, 0.0 if rates and name in self.running else None)

    def row(self, name: str, state: str, where: str, rows: Number, running: Number, last_used: Number) -> Row:
        return Row(
            name, state, where, rows, self.running.get(name, running), self._waiting.get(name),
            self._rate(self._requests, name), self._rate(self._tokens, name), self._ttft.get(name), last_used,
        )  # fmt: skip


def _row(adapter: AdapterObject, told: _Told) -> Row:
    version = next((version for version in adapter.versions if version.version == adapter.active), None)
    if version is None:
        return told.row(adapter.name, "not active", "-", None, None, None)
    where = f"{version.resident}*" if adapter.pinned else version.resident
    return told.row(
        adapter.name, version.state, where, version.rows, version.requests_running, version.last_used
    )  # fmt: skip


def _matches(adapter: AdapterObject, search: str) -> bool:
    """As the API's `search`, for a server that does not know it."""
    texts = [adapter.name, *(version.description or "" for version in adapter.versions)]
    return any(search.lower() in text.lower() for text in texts)
