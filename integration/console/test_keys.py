"""The key of a tab: one that the server no longer knows, a view that needs another, and the form that asks for it."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from integration.browser import KEY_ITEM
from integration.console.local import LocalServer, key, local_server
from integration.console.pages import go, stored_key, watched_page

OLD_KEY = "the-key-of-the-server-before"
STALE = "The server does not know this tab's key any more"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """One that needs a key only for changes and metrics, as `make serve` starts it."""
    with local_server(tmp_path_factory.mktemp("keys"), has_admin=True) as server:
        yield server


def become_stale(page: Page) -> None:
    """The tab has from now on what it has after a restart of the server: a key of before."""
    page.evaluate("([name, key]) => sessionStorage.setItem(name, key)", [KEY_ITEM, OLD_KEY])


def field(within: Page | Locator) -> Locator:
    return within.get_by_label("API key, metrics key or admin key")


def rounds(page: Page, count: int) -> None:
    """Wait until the page has asked for its session so many times more."""
    for _ in range(count):
        with page.expect_response("**/console/session"):
            pass


def test_a_key_that_the_server_no_longer_knows_is_said_once_and_replaced(browser: Browser, server: LocalServer) -> None:
    with watched_page(browser, server.url, key("admin"), place="#/adapters/pirate") as page:
        expect(page.get_by_role("button", name="Delete", exact=True)).to_be_visible()
        become_stale(page)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text(STALE)
        expect(page.locator("#banner")).to_contain_text(STALE)
        assert page.url.endswith("#/adapters/pirate") and stored_key(page) == OLD_KEY
        dialog.get_by_role("button", name="Cancel").click()
        rounds(page, 2)
        assert page.get_by_role("dialog").count() == 0 and stored_key(page) == OLD_KEY
        expect(page.get_by_role("heading", name="pirate", exact=True)).to_be_visible()
        page.get_by_role("button", name="Enter a key").click()
        field(dialog).fill("a-wrong-key-0123456789")
        page.keyboard.press("Enter")
        expect(dialog.get_by_text("The server does not know this key.")).to_be_visible()
        assert stored_key(page) == OLD_KEY
        field(dialog).fill(key("admin"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Delete", exact=True)).to_be_visible()
        expect(page.locator("#banner")).to_be_hidden()
        assert page.url.endswith("#/adapters/pirate") and stored_key(page) == key("admin")


def test_so_it_is_after_a_reload_in_a_view_that_needs_a_key(browser: Browser, server: LocalServer) -> None:
    with watched_page(browser, server.url, OLD_KEY, place="#/watch/pirate") as page:
        expect(page.get_by_role("heading", name="Watch needs another key")).to_be_visible()
        expect(page.locator("#banner")).to_contain_text(STALE)
        assert page.get_by_role("dialog").count() == 0, "one form is enough"
        expect(field(page)).to_be_focused()
        field(page).fill(key("admin"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="Use of the experts")).to_be_visible()
        assert page.url.endswith("#/watch/pirate")


def test_a_reader_without_a_key_sees_that_there_is_more(browser: Browser, server: LocalServer) -> None:
    with watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        expect(page.get_by_role("button", name="Enter a key")).to_be_visible()
        go(page, "#/watch")
        card = page.locator("main")
        expect(card.get_by_role("heading", name="Watch needs a key")).to_be_visible()
        expect(card).to_contain_text("It is for the metrics key and the admin key.")
        expect(card).to_contain_text("Found no key, expected")
        views = page.get_by_role("navigation", name="Views").get_by_role("link")
        assert views.all_inner_texts() == ["Adapters", "Playground"]
        field(card).fill(key("admin"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="Busiest adapters", exact=True)).to_be_visible()
        page.get_by_role("button", name="Key: admin").click()
        page.keyboard.press("Escape")
        assert page.get_by_role("dialog").count() == 0


def test_code_for_a_server_without_keys_has_none(browser: Browser, server: LocalServer) -> None:
    """Whatever key the tab has for other things."""
    with watched_page(browser, server.url, key("admin"), place="#/playground?model=pirate") as page:
        page.get_by_label("Prompt", exact=True).fill("Ahoy")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Code of the request to pirate").click()
        code = page.get_by_role("dialog")
        expect(code).to_contain_text('api_key="unused"')
        expect(code).not_to_contain_text("PERFT_API_KEY")
        expect(code).not_to_contain_text("Authorization")


def test_settings_that_were_closed_stay_closed(browser: Browser, server: LocalServer) -> None:
    with watched_page(browser, server.url, place="#/playground") as page:
        tokens = page.get_by_label("Max tokens", exact=True)
        page.get_by_text("Settings", exact=False).first.click()
        tokens.fill("24")
        for is_open in (True, False):
            if not is_open:
                page.get_by_text("Settings", exact=False).first.click()
            go(page, "#/adapters")
            expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
            go(page, "#/playground")
            expect(tokens).to_have_value("24")
            expect(tokens).to_be_visible(visible=is_open)
