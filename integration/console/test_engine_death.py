"""An engine that hangs, and one that dies with its server: an open page says so and comes back by itself."""

from pathlib import Path

from playwright.sync_api import Browser, expect

from integration.console.conftest import Open
from integration.console.local import local_server
from integration.console.pages import watched_page
from integration.console.real_server import RealServer, adapter
from tests.server.tiny_server import TinyClient

OPERATIONS = ("status", "counters", "inventory", "prepare", "place", "evict", "drop", "forget")


def test_the_page_says_so_and_comes_back(
    admin: TinyClient, open_console: Open, real: RealServer, tmp_path: Path
) -> None:
    assert admin.upload("poet", adapter(tmp_path / "poet", 1)).status_code == 201
    pages = [
        open_console("admin", place)
        for place in ("#/adapters", "#/adapters/poet", "#/playground?model=poet", "#/watch")
    ]
    for page in pages:
        expect(page.locator("#state")).to_have_text("Ready")
    asking = pages[2]
    asking.get_by_label("Prompt", exact=True).fill("t7 t8")
    with real.engine_still():
        asking.get_by_role("button", name="Ask", exact=True).click()
        expect(asking.get_by_text("Waiting for the first token")).to_be_visible()
        real.kill_engine()
        for page in pages:
            expect(page.locator("#state")).not_to_have_text("Ready")
            expect(page.locator("#banner")).to_be_visible()
    for page in pages:
        expect(page.locator("#state")).to_have_text("Not reachable")
        expect(page.locator("#banner")).to_contain_text("The server does not answer.")
    expect(asking.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    expect(asking.locator(".turn-error")).to_be_visible()
    real.start()
    for page in pages:
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#banner")).to_be_hidden()
    expect(pages[0].get_by_test_id("adapter-poet")).to_be_visible()
    asking.get_by_label("Prompt", exact=True).fill("t7 t8")
    asking.get_by_role("button", name="Ask", exact=True).click()
    expect(asking.locator(".turn-text").last).not_to_be_empty()


def test_an_engine_that_hangs(browser: Browser, tmp_path: Path) -> None:
    """On the fake engine, which hangs as long as it is told to."""
    with local_server(tmp_path) as server, watched_page(browser, server.url) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        server.engine.holds = {operation: Path("/") for operation in OPERATIONS}
        expect(page.locator("#state")).to_have_text("Not ready")
        expect(page.locator("#banner")).to_contain_text("The engine has not answered for")
        server.engine.holds = {}
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#banner")).to_be_hidden()
