"""Owns the command `perft top`: its arguments, its keys and how it exits.

Invariant: exit 0 means ended by `q`, 130 by Ctrl-C, 1 that the server was not reachable at the start, 2 wrong usage.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from rich.text import Text

from perft.reading import printable
from server.client.arguments import add_connection, server_of
from server.client.connection import ClientError
from server.client.http import AdaptersClient
from server.client.live.polling import Poller
from server.client.live.rows import ORDERS
from server.client.live.screen import BACKSPACE, ENTER, ESCAPE, NO_TERMINAL, is_terminal, run_view
from server.client.live.sources import Sources
from server.client.live.view import Choice, Shown, lines_of

SCRAPE_S, ADAPTERS_S, READY_S = 1.0, 2.0, 2.0
TIMEOUT_S = 10.0
MOST_SEARCHED = 64
"""Characters of a search."""


def run(arguments: list[str]) -> int:
    """Run `perft top ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = _parser()
    server = server_of(parser, parser.parse_args(arguments))
    if not is_terminal():
        parser.error(f"{NO_TERMINAL}; for a program, ask GET /metrics and GET /v1/adapters")
    try:
        with AdaptersClient(server) as client:
            return Top(server.url, Sources(client)).run()
    except ClientError as error:
        print(f"perft top: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"perft top: {error}", file=sys.stderr)
        return 1


class Top:
    """The view of one server and what its keys do."""

    def __init__(self, url: str, sources: Sources) -> None:
        self._url, self._sources, self._choice = url, sources, Choice()
        self._ready = Poller(sources.ready, READY_S)
        self._metrics = Poller(sources.metrics, SCRAPE_S)
        self._adapters = Poller(sources.adapters, ADAPTERS_S)

    def run(self) -> int:
        """Until a key or Ctrl-C ends it. Raises ClientError if the server cannot be reached at the start."""
        self._ready.poll()
        problem = self._ready.latest.problem
        if problem is not None and problem.status == 0:
            raise problem
        return run_view(self._draw, [self._ready, self._metrics, self._adapters], self._pressed)

    def _draw(self, width: int, height: int) -> Sequence[Text]:
        shown = Shown(self._ready.latest, self._metrics.latest, self._adapters.latest)
        return lines_of(shown, self._choice, self._url, width, height, time.time())

    def _pressed(self, key: str) -> bool:
        """Do what a key asks for. True: end."""
        choice = self._choice
        if choice.is_typing:
            self._typed(key)
        elif key in ("q", "Q"):
            return True
        elif key == "/":
            choice.is_typing = True
        elif key == "r":
            choice.is_reversed = not choice.is_reversed
        elif key in ("s", "S"):
            choice.order = (choice.order + (1 if key == "s" else -1)) % len(ORDERS)
            choice.is_reversed = False
        elif key == ESCAPE:
            choice.search = ""
        self._ask()
        return False

    def _typed(self, key: str) -> None:
        """A key while a search is typed."""
        choice = self._choice
        if key in (ENTER, ESCAPE):
            choice.is_typing = False
            choice.search = "" if key == ESCAPE else choice.search
        elif key == BACKSPACE:
            choice.search = choice.search[:-1]
        elif key.isprintable() and len(key) == 1:
            choice.search = (choice.search + key)[:MOST_SEARCHED]

    def _ask(self) -> None:
        """Ask for another page at once, if it is another one that is shown now."""
        api = ORDERS[self._choice.order].api
        if self._choice.is_reversed:
            api = api.removeprefix("-") if api.startswith("-") else f"-{api}"
        if (api, self._choice.search) != (self._sources.sort, self._sources.search):
            self._sources.sort, self._sources.search = api, self._choice.search
            self._adapters.ask_now()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perft top",
        description="Show a running server on the terminal, refreshed every second: whether it is ready, requests, "
        "tokens per second, latencies of the last 10 seconds, KV cache, the pool's rows, loads and evictions, errors, "
        "and its adapters. Keys: s and S change the column that is sorted by, r reverses it, / searches, q quits.",
        epilog="What the key may not read is left out: the metrics need the metrics or admin key, the adapters an API "
        "key or the admin key. Exit status: 0 ended by q, 130 by Ctrl-C, 1 not reachable, 2 wrong usage.",
    )
    add_connection(parser, is_default=True, timeout_s=TIMEOUT_S)
    return parser
