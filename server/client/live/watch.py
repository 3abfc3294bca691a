"""Owns `perft adapters list --watch`: the table of the command, refreshed in place.

Invariant: a server that goes away stays a line above the last table; a refusal that will not pass ends the command.
"""

import time
from typing import Any

from rich.text import Text

from perft.reading import printable
from server.api.schemas import AdapterObject
from server.client.http import AdapterPage, AdaptersClient
from server.client.live.polling import Polled, Poller
from server.client.live.screen import run_view
from server.client.table import adapters_table, versions_table

MOST_ROWS = 200
RESERVED_LINES = 4
"""The heading, the table's titles, what is left out, and a line that stays empty."""


def watch(client: AdaptersClient, name: str | None, interval_s: float) -> int:
    """Show the adapters, or the versions of one, until q (0) or Ctrl-C (130). Raises ClientError."""

    def ask() -> AdapterPage | AdapterObject:
        return client.page(limit=MOST_ROWS) if name is None else client.adapter(name)

    poller = Poller(ask, interval_s)
    poller.poll()

    def draw(width: int, height: int) -> list[Text]:
        latest = poller.latest
        if latest.problem is not None and (latest.value is None or not latest.problem.may_pass):
            raise latest.problem
        assert latest.value is not None
        heading = Text.assemble((f"every {interval_s:g} s  {clock(time.time())}  q quits", "dim"))
        return [heading, state_line(latest), *_table(latest.value, width, max(1, height - RESERVED_LINES))]

    return run_view(draw, [poller], lambda key: key in ("q", "Q"))


def state_line(polled: Polled[Any]) -> Text:
    """The problem since the last answer, or that there was one, or nothing."""
    if polled.problem is not None and polled.since is not None:
        return Text(f"since {clock(polled.since)}, trying again: {printable(str(polled.problem))}", "bold red")
    if polled.back is not None:
        return Text(f"{clock(polled.back)}: the server is back", "green")
    return Text()


def clock(seconds: float) -> str:
    """Unix seconds as the time of day here."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _table(shown: AdapterPage | AdapterObject, width: int, rows: int) -> list[Text]:
    """The table's rows, as many as there is room for, and how many more there are."""
    if isinstance(shown, AdapterPage):
        titles, *lines = adapters_table(shown.data[:rows], width).split("\n")
        left = (shown.total or len(shown.data)) - len(lines)
        more = f"and {left:,} more" if left else "and more" if shown.has_more else ""
    else:
        kept = shown.versions[-rows:]
        titles, *lines = versions_table(shown.model_copy(update={"versions": kept}), width).split("\n")
        left = len(shown.versions) - len(kept)
        more = f"and {left:,} older versions" if left else ""
    return [Text(titles, "bold"), *map(Text, lines), Text(more, "dim")]
