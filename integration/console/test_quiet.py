"""What an open page costs: nothing while it is hidden, and at most one scrape a second while it is looked at."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from integration.console.local import LocalServer, local_server
from integration.console.pages import RawTabs, go, watched_page
from tests.server.processes import wait_until

QUIET_S = 12
"""Longer than the longest pause between two polls."""
SCRAPES = """() => performance.getEntriesByType("resource")
    .filter(({name}) => new URL(name).pathname === "/console/metrics").map(({startTime}) => startTime)"""
SCRAPING = ("#/watch", "#/watch/pirate", "#/adapters", "#/adapters/pirate")
VIEWS = (*SCRAPING, "#/playground")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, LocalServer]]:
    """One for each view, so that what a page asks is known to be its."""
    with ExitStack() as stack:
        started = {}
        for number, view in enumerate(VIEWS):
            folder = tmp_path / str(number)
            folder.mkdir()
            started[view] = stack.enter_context(local_server(folder))
        yield started


def test_hidden_pages_ask_nothing(browser: Browser, servers: dict[str, LocalServer]) -> None:
    """Each is hidden once the next one is in front."""
    tabs = RawTabs(browser)
    try:
        pages = {}
        for view, server in servers.items():
            pages[view] = tabs.open(f"{server.url}/{view}")
            wait_until(partial(has_polled, server))
        tabs.bring_to_front(tabs.open("about:blank"))
        time.sleep(2)  # what was asked just before may still come
        before = {view: len(server.asked) for view, server in servers.items()}
        time.sleep(QUIET_S)
        asked = {view: server.asked[before[view] :] for view, server in servers.items()}
        assert not any(asked.values()), asked
        for view, server in servers.items():
            tabs.bring_to_front(pages[view])
            wait_until(lambda view=view, server=server: len(server.asked) > before[view])
    finally:
        tabs.close()


def has_polled(server: LocalServer) -> bool:
    """Whether its page has asked for what changes once more than when it came."""
    return len(server.asked) > 40 or server.asked.count(("GET", "/console/session")) > 1


def starts(page: Page, count: int) -> list[float]:
    """When the page asked for metrics, in seconds; waits for `count` times."""
    wait_until(lambda: len(page.evaluate(SCRAPES)) >= count, 0.2)
    return [each / 1000 for each in page.evaluate(SCRAPES)]


def test_a_viewer_scrapes_at_most_once_a_second(browser: Browser, servers: dict[str, LocalServer]) -> None:
    with ExitStack() as stack:
        pages = {view: stack.enter_context(watched_page(browser, servers[view].url, place=view)) for view in SCRAPING}
        for view, page in pages.items():
            found = starts(page, 6)
            assert min(later - earlier for earlier, later in pairwise(found)) > 0.95, (view, found)


def test_nor_does_one_who_goes_from_view_to_view(browser: Browser, tmp_path: Path) -> None:
    with local_server(tmp_path) as server, watched_page(browser, server.url) as page:
        for _ in range(6):
            for view in ("#/watch", "#/adapters", "#/watch/pirate", "#/adapters/pirate", "#/watch"):
                go(page, view)
                page.wait_for_timeout(50)
        found = starts(page, 4)
        assert min(later - earlier for earlier, later in pairwise(found)) > 0.95, found


def test_no_more_is_asked_in_other_views_so_that_watch_has_the_last_minutes(browser: Browser, tmp_path: Path) -> None:
    with local_server(tmp_path) as server, watched_page(browser, server.url, place="#/playground") as page:
        before = len(starts(page, 3))
        go(page, "#/adapters")
        found = starts(page, before + 4)
        assert min(later - earlier for earlier, later in pairwise(found)) > 2.5, (
            f"the views share what is read: {found}"
        )
        go(page, "#/watch")
        page.get_by_role("button", name="Running and waiting as a table").click()
        times = page.get_by_role("region", name="Running and waiting", exact=True).locator("tbody th")
        assert times.count() >= 5
