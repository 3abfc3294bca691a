"""What each key is offered: nothing that it may not do, and all that it may."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from integration.console.conftest import Open
from integration.console.local import key, local_server
from integration.console.pages import drop, go, stored_key, watched_page
from integration.console.real_server import KEYS, RealServer, adapter
from tests.server.tiny_server import BASE_NAME, TinyClient

CHANGES = ("Upload an adapter", "Upload a version", "Pin", "Who may use it", "Delete", "Activate", "Roll back")


@pytest.fixture
def poet(admin: TinyClient, tmp_path: Path) -> int:
    """The older of its two versions."""
    numbers = [
        int(admin.upload("poet", adapter(tmp_path / str(seed), seed)).headers["location"].rpartition("/")[2])
        for seed in (1, 2)
    ]
    return numbers[0]


def views(page: Page) -> list[str]:
    return page.get_by_role("navigation", name="Views").get_by_role("link").all_inner_texts()


def offered(page: Page) -> list[str]:
    return [name for name in CHANGES if page.get_by_role("button", name=name, exact=True).count()]


def test_an_api_key_may_look_and_ask(poet: int, admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    page = open_console("alice")
    expect(page.get_by_test_id("adapter-poet")).to_be_visible()
    assert views(page) == ["Adapters", "Playground"] and offered(page) == []
    go(page, "#/adapters/poet")
    expect(page.get_by_role("button", name=f"Compare version {poet} with the active one")).to_be_visible()
    assert offered(page) == []
    page.get_by_role("button", name=f"Compare version {poet} with the active one").click()
    expect(page.get_by_role("dialog").get_by_role("row", name="Content (digest)")).to_be_visible()
    assert offered(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name=f"Details of version {poet}").click()
    expect(page.get_by_role("dialog")).to_contain_text("Digest")
    assert page.get_by_role("dialog").get_by_role("button", name="Delete this version").count() == 0
    assert page.get_by_role("dialog").get_by_role("button", name="adapter_model").count() == 0
    page.keyboard.press("Escape")
    drop(page, page.locator("main"), adapter(tmp_path / "mine", 3))
    refusal = page.get_by_role("dialog", name="These files were not uploaded")
    expect(refusal).to_contain_text("found the key 'alice', expected the admin key")
    refusal.get_by_role("button", name="Close").click()
    go(page, "#/watch")
    expect(page.get_by_role("heading", name="Watch needs another key")).to_be_visible()
    assert page.get_by_role("dialog").count() == 0 and page.url.endswith("#/watch")
    assert [each["name"] for each in admin.http.get("/v1/adapters").json()["data"]] == ["poet"]


def test_the_metrics_key_only_watches(poet: int, open_console: Open) -> None:
    page = open_console("metrics")
    expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
    assert views(page) == ["Watch"] and offered(page) == []
    go(page, "#/adapters/poet")
    expect(page.get_by_role("heading", name="Adapters needs another key")).to_be_visible()
    page.get_by_role("link", name="perft console").click()
    expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
    assert page.locator("main").get_by_role("link", name="Open in the playground").count() == 0


def test_the_admin_key_may_all(poet: int, open_console: Open) -> None:
    page = open_console("admin")
    expect(page.get_by_test_id("adapter-poet")).to_be_visible()
    assert views(page) == ["Adapters", "Playground", "Watch"] and offered(page) == ["Upload an adapter"]
    go(page, "#/adapters/poet")
    expect(page.get_by_role("button", name="Delete", exact=True)).to_be_visible()
    assert set(offered(page)) >= {"Upload a version", "Pin", "Who may use it", "Delete"}


def test_a_key_is_asked_for_and_kept_for_the_tab_only(poet: int, open_console: Open, real: RealServer) -> None:
    page = open_console(None)
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    assert views(page) == [] and BASE_NAME not in page.locator("body").inner_text()
    field = page.get_by_label("API key, metrics key or admin key")
    field.fill("a-wrong-key-0123456789")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_text("The server does not know this key.")).to_be_visible()
    assert stored_key(page) is None
    field.fill(KEYS["alice"])
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("adapter-poet")).to_be_visible()
    assert stored_key(page) == KEYS["alice"]
    assert KEYS["alice"] not in page.url and KEYS["alice"] not in page.content()
    kept = page.evaluate("[JSON.stringify(localStorage), document.cookie]")
    assert KEYS["alice"] not in "".join(kept)
    page.reload()
    expect(page.get_by_test_id("adapter-poet")).to_be_visible()
    other = page.context.new_page()
    other.goto(real.url)
    expect(other.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    page.get_by_role("button", name="Key: alice").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    assert stored_key(page) is None


def test_without_keys_all_is_offered_to_this_machine(browser: Browser, tmp_path: Path) -> None:
    """On the fake engine: the real server here has keys."""
    with local_server(tmp_path) as server, watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        assert views(page) == ["Adapters", "Playground", "Watch"] and offered(page) == ["Upload an adapter"]


def test_where_all_may_ask_the_admin_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    """On the fake engine: the real server here has keys for all."""
    with local_server(tmp_path, has_admin=True) as server, watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        assert offered(page) == []
        page.get_by_role("button", name="Type in the admin key to upload and change adapters").click()
        page.get_by_label("API key, metrics key or admin key").fill(key("admin"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Upload an adapter")).to_be_visible()
        expect(page.get_by_role("button", name=re.compile("^Type in the admin key"))).to_have_count(0)
