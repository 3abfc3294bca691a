"""Owns what `perft top` shows: the server's state and numbers above, the adapters below, in the room there is.

Invariant: every text from the server passes `printable`, and is never read as markup.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich.text import Text

from perft.reading import printable
from server.client.connection import ClientError
from server.client.http import AdapterPage
from server.client.live.polling import Polled
from server.client.live.rows import EXPENDABLE, NUMBERS, ORDERS, TITLES, cells, in_order, number, rows_of, seconds
from server.client.live.samples import WINDOW_S, Change
from server.client.live.sources import INTER_TOKEN, TTFT
from server.client.live.watch import clock
from server.client.table import table_lines

LABEL_WIDTH, BAR_WIDTH, HALF_WIDTH, PAIRS_WIDTH = 11, 14, 52, 116
ENDED_WELL = frozenset(("stop", "length", "tool_calls", "content_filter", "repetition", "abort"))
"""Finish reasons that are no error."""


@dataclass(frozen=True)
class Shown:
    """What there is to show. ready: True, or a problem."""

    ready: Polled[bool]
    metrics: Polled[Change]
    adapters: Polled[AdapterPage]


@dataclass
class Choice:
    """What the keys chose. order: an index of ORDERS. typing: whether keys go to the search."""

    order: int = 0
    is_reversed: bool = False
    search: str = ""
    is_typing: bool = False


def lines_of(shown: Shown, choice: Choice, url: str, width: int, height: int, now: float) -> list[Text]:
    """The whole view. now: unix seconds."""
    heading = Text.assemble(("perft top", "bold"), f"  {printable(url)}  ", _state(shown), f"  {clock(now)}")
    facts = list(_facts(shown.metrics.value, _pinned_rows(shown.adapters.value, choice.search)))
    if width >= PAIRS_WIDTH:
        facts = _in_pairs(facts)
    above = [heading, *facts, *_left_out(shown), Text()]
    room = max(0, height - len(above) - 3)
    return [*above, *_table(shown, choice, width, room, now), _foot(choice)]


def _state(shown: Shown) -> Text:
    problem = shown.ready.problem
    if problem is None:
        return Text("ready" if shown.ready.value else "...", "bold green")
    since = "" if shown.ready.since is None else f" since {clock(shown.ready.since)}"
    if problem.status == 0:
        return Text(f"NO ANSWER{since}", "bold red")
    return Text(f"NOT READY{since}", "bold red")


def _left_out(shown: Shown) -> Iterator[Text]:
    """A line for each thing that is not there, or old, with the reason."""
    problem = shown.ready.problem
    if problem is not None:
        yield Text(printable(str(problem)), "red")
    for what, polled in (("metrics", shown.metrics), ("adapters", shown.adapters)):
        other = polled.problem
        if other is not None and not (problem is not None and problem.status == other.status == 0):
            state = "left out" if polled.value is None else "not new"
            yield Text(f"{what} {state}: {_reason(other)}", "yellow")


def _reason(problem: ClientError) -> str:
    if problem.status == 404:
        return "the server has them on an address of its own (--metrics-bind), and no console"
    return printable(str(problem))


def _facts(change: Change | None, pinned: float | None) -> Iterator[Text]:
    if change is None:
        return
    new = change.new
    running, waiting = (new.total(f"perft_adapter_requests_{state}") for state in ("running", "waiting"))
    ended = change.rate("perft_adapter_requests_total")
    yield _fact("requests", f"{number(running)} running, {number(waiting)} waiting, {number(ended)}/s ended")
    generated, prompt = (change.rate(f"vllm:{kind}_tokens_total") for kind in ("generation", "prompt"))
    yield _fact("tokens/s", f"{number(generated)} generated, {number(prompt)} of prompts")
    for label, histogram in (("TTFT", TTFT), ("per token", INTER_TOKEN)):
        median, high = (seconds(change.quantile(histogram, share)) for share in (0.5, 0.95))
        yield _fact(label, f"p50 {median}, p95 {high} ({WINDOW_S:g} s)")
    cache = new.total("vllm:kv_cache_usage_perc")
    yield _fact("KV cache", "-") if cache is None else _fact("KV cache", _bar([(cache, "cyan", "█")]), f" {cache:.0%}")
    yield _pool(change, pinned)
    evicted = (new.total("perft_adapter_evictions_total", tier=tier) for tier in ("device", "host"))
    loads = (new.total("perft_adapter_loads_total", result=result) for result in ("ok", "failed"))
    device, host = map(number, evicted)
    loaded, failed = map(number, loads)
    yield _fact("loads", f"{loaded}, {failed} failed; evicted: {device} device, {host} host")
    yield _fact("errors", _errors(change))


def _pool(change: Change, pinned: float | None) -> Text:
    used, total = (change.new.total(f"perft_device_rows_{kind}") for kind in ("used", "total"))
    if used is None or not total:
        return _fact("pool", "-")
    kept = min(used, pinned or 0.0)
    bar = _bar([((used - kept) / total, "cyan", "█"), (kept / total, "magenta", "▓")])
    known = "" if pinned is None else f"{number(kept)} pinned, "
    return _fact("pool", bar, f" {number(used - kept)} used, {known}{number(total - used)} free")


def _pinned_rows(page: AdapterPage | None, search: str) -> float | None:
    """Rows of pinned adapters on the device; versions of equal content share theirs. None: they are not all here."""
    if page is None or search:
        return None
    pinned = [adapter for adapter in page.data if adapter.pinned]
    rows = {
        version.digest: version.rows
        for adapter in pinned
        for version in adapter.versions
        if version.version == adapter.active and version.resident == "device"
    }
    return float(sum(rows.values()))


def _errors(change: Change) -> str:
    """Codes with which requests ended, then HTTP statuses: how many in all, and how many lately."""
    ended = _counts(change, "perft_adapter_requests_total", "finish_reason")
    statuses = _counts(change, "http_requests_total", "status")
    found = [count for code, count in ended.items() if code not in ENDED_WELL]
    found += [f"HTTP {count}" for status, count in statuses.items() if status[:1] in ("4", "5")]
    return ", ".join(found) or "none"


def _counts(change: Change, name: str, label: str) -> dict[str, str]:
    """What a counter counted, for each value of a label that it has counted: `code 3 (+1)`."""
    rates = change.rates(name, label)
    counts = dict[str, str]()
    for value, total in sorted(change.new.by(name, label).items()):
        lately = rates.get(value, 0.0) * change.seconds
        if total:
            counts[value] = f"{printable(value)} {number(total)}" + (f" (+{number(round(lately))})" if lately else "")
    return counts


def _fact(label: str, *parts: str | Text) -> Text:
    return Text.assemble((label.ljust(LABEL_WIDTH), "bold"), *parts)


def _bar(shares: list[tuple[float, str, str]]) -> Text:
    """A bar of BAR_WIDTH cells. shares: of the whole (0 to 1), style and sign of each part; the rest is free."""
    bar = Text()
    for share, style, sign in shares:
        cells = round(share * BAR_WIDTH) if 0 <= share <= 1 else 0
        bar.append(sign * max(cells, 1 if share > 0 else 0), style)
    bar.truncate(BAR_WIDTH)
    return bar.append("░" * (BAR_WIDTH - len(bar)), "dim")


def _in_pairs(facts: list[Text]) -> list[Text]:
    """Two facts a line."""
    pairs = []
    for left, right in zip_longest(facts[::2], facts[1::2], fillvalue=Text()):
        left.align("left", HALF_WIDTH)
        pairs.append(Text.assemble(left, right))
    return pairs


def _table(shown: Shown, choice: Choice, width: int, room: int, now: float) -> list[Text]:
    """The adapters in the chosen order, as many as there is room for, and how many more there are; `room + 2` lines."""
    page = shown.adapters.value
    if page is None and shown.metrics.value is None:
        return [Text()] * (room + 2)
    order = ORDERS[choice.order]
    rows = in_order(rows_of(page, shown.metrics.value, choice.search), order, choice.is_reversed)
    mark = "▼" if order.largest_first != choice.is_reversed else "▲"
    titles = [f"{title}{mark}" if title == order.title else title for title in TITLES]
    expendable = [title for title in EXPENDABLE if title != order.title]
    right = [title for title in titles if title.rstrip("▼▲") in NUMBERS]
    head, *lines = table_lines(titles, [cells(row, now) for row in rows[:room]], width, expendable, right)
    lines += [""] * (room - len(lines))
    return [Text(head, "bold reverse"), *map(Text, lines), Text(_more(page, len(rows), room), "dim")]


def _more(page: AdapterPage | None, there: int, room: int) -> str:
    """How many adapters have no line."""
    unread = 0 if page is None else (page.total or len(page.data)) - len(page.data)
    left = unread + max(0, there - room)
    if page is not None and page.has_more and page.total is None:
        return "and more"
    return f"and {left:,} more" if left else "" if there else "no adapters"


def _foot(choice: Choice) -> Text:
    if choice.is_typing:
        return Text.assemble(
            ("search: ", "bold"), printable(choice.search), ("_", "blink"), "  (Enter, or Esc for all)"
        )
    found = f"  search: {printable(choice.search)}" if choice.search else ""
    return Text(f"q quit  s/S sort  r reverse  / search{found}", "dim")
