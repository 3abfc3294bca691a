"""What an open page costs: nothing while it is hidden, and at most one scrape a second while it is looked at."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from integration.console.local import local_server
from integration.console.pages import RawTabs, go, watched_page
from tests.server.processes import wait_until

QUIET_S = 12
"""Longer than the longest pause between two polls."""
SCRAPES = """() => performance.getEntriesByType("resource")
    .filter(({name}) => new URL(name).pathname === "/console/metrics").map(({startTime}) => startTime)"""
VIEWS = ["#/watch", "#/watch/pirate", "#/adapters", "#/adapters/pirate", "#/playground"]


@pytest.mark.parametrize("view", VIEWS)
def test_a_hidden_page_asks_nothing(browser: Browser, tmp_path: Path, view: str) -> None:
    with local_server(tmp_path) as server:
        tabs = RawTabs(browser)
        try:
            console = tabs.open(f"{server.url}/{view}")
            wait_until(lambda: ("GET", "/console/session") in server.asked)
            wait_until(lambda: len(server.asked) > 40 or server.asked.count(("GET", "/console/session")) > 1)
            other = tabs.open("about:blank")
            tabs.bring_to_front(other)
            time.sleep(2)  # what was asked just before may still come
            before = len(server.asked)
            time.sleep(QUIET_S)
            assert server.asked[before:] == []
            tabs.bring_to_front(console)
            wait_until(lambda: len(server.asked) > before)
        finally:
            tabs.close()


def starts(page: Page, count: int) -> list[float]:
    """When the page asked for metrics, in seconds; waits for `count` times."""
    wait_until(lambda: len(page.evaluate(SCRAPES)) >= count, 0.2)
    return [each / 1000 for each in page.evaluate(SCRAPES)]


@pytest.mark.parametrize("view", ["#/watch", "#/watch/pirate", "#/adapters", "#/adapters/pirate"])
def test_a_viewer_scrapes_at_most_once_a_second(browser: Browser, tmp_path: Path, view: str) -> None:
    with local_server(tmp_path) as server, watched_page(browser, server.url, place=view) as page:
        found = starts(page, 6)
        assert min(later - earlier for earlier, later in pairwise(found)) > 0.95, found


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
