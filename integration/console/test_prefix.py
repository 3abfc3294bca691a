"""The console behind a reverse proxy, below a prefix: with --root-path, and with no more than a trailing slash."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from integration.console.local import key, local_server
from integration.console.pages import drop, go, watched_page
from integration.console.prefix_proxy import proxied
from tests.server.fakes import BASE
from tests.synthetic import write_adapter

PREFIX = "/models/mixtral"


@pytest.mark.parametrize(("root_path", "slash"), [(PREFIX, ""), (PREFIX, "/"), ("", "/")], ids=str)
def test_below_a_prefix(browser: Browser, tmp_path: Path, root_path: str, slash: str) -> None:
    """On the fake engine. A proxy stands for somebody else: the server has keys."""
    with (
        local_server(tmp_path, has_keys=True, root_path=root_path) as server,
        proxied(PREFIX, server.url) as (url, strays),
        watched_page(browser, url, key("admin"), place=slash.lstrip("/")) as page,
    ):
        if not slash:
            page.goto(url)
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        go(page, "#/adapters/pirate")
        expect(page.get_by_role("heading", name="pirate")).to_be_visible()
        drop(page, page.locator("main"), write_adapter(tmp_path / "made", BASE, 77))
        page.get_by_role("dialog").get_by_role("button", name="Upload", exact=True).click()
        expect(page.get_by_role("region", name="Uploads")).to_contain_text("is new and active")
        go(page, "#/playground?model=pirate")
        page.get_by_label("Prompt", exact=True).fill("hello")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("region", name="pirate", exact=True).locator(".turn-text").last).not_to_be_empty()
        page.get_by_role("button", name="Code of the request to pirate").click()
        expect(page.get_by_role("dialog").locator("pre").first).to_contain_text(f"{url}/v1/chat/completions")
        page.keyboard.press("Escape")
        go(page, "#/watch")
        expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
        assert page.url.startswith(f"{url}{slash}") or page.url.startswith(f"{url}/")
        assert [path for path in strays if path != "/favicon.ico"] == []
