"""The table while the pointer rests on it: no row moves; what is new and what is gone shows. On the fake engine."""

import re
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect

from integration.console.local import local_server
from integration.console.pages import drop, watched_page
from tests.server.fakes import BASE
from tests.synthetic import write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def rows(page: Page) -> list[str]:
    return page.locator("table.adapters tbody .name").all_inner_texts()


def upload(url: str, name: str, folder: Path) -> None:
    files = {"config": (folder / CONFIG).read_bytes(), "weights": (folder / WEIGHTS).read_bytes()}
    httpx.post(f"{url}/v1/adapters", data={"name": name}, files=files).raise_for_status()


def test_new_and_gone_adapters_show_while_a_row_is_pointed_at(browser: Browser, tmp_path: Path) -> None:
    with local_server(tmp_path, names=6) as server, watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        before = rows(page)
        page.get_by_test_id("adapter-pirate").hover()
        upload(server.url, "a-first", write_adapter(tmp_path / "first", BASE, 700))
        expect(page.get_by_test_id("adapter-a-first")).to_be_visible()
        assert rows(page) == [*before, "a-first"]
        httpx.delete(f"{server.url}/v1/adapters/json").raise_for_status()
        expect(page.get_by_test_id("adapter-json").locator(".c-state")).to_have_text("gone")
        assert rows(page) == [*before, "a-first"]
        page.mouse.move(0, 0)
        expect(page.get_by_test_id("adapter-json")).to_have_count(0)
        assert rows(page) == sorted({*before, "a-first"} - {"json"})


def test_an_own_upload_orders_the_table_anew(browser: Browser, tmp_path: Path) -> None:
    with local_server(tmp_path, names=6) as server, watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-pirate")).to_be_visible()
        before = rows(page)
        drop(page, page.locator("main"), write_adapter(tmp_path / "own", BASE, 701))
        page.get_by_role("dialog").get_by_label("Name", exact=True).fill("a-first")
        page.get_by_role("dialog").get_by_role("button", name=re.compile("^Upload")).focus()
        page.mouse.move(*middle(page, "adapter-pirate"))
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("adapter-a-first")).to_be_visible()
        assert page.locator("table.adapters tbody").evaluate("body => body.matches(':hover')")
        assert rows(page) == sorted([*before, "a-first"])


def test_of_several_pages_what_is_new_is_shown_on_demand(browser: Browser, tmp_path: Path) -> None:
    with local_server(tmp_path, names=60) as server, watched_page(browser, server.url) as page:
        expect(page.get_by_test_id("adapter-arithmetic")).to_be_visible()
        before = rows(page)
        page.get_by_test_id("adapter-arithmetic").hover()
        upload(server.url, "a-first", write_adapter(tmp_path / "first", BASE, 702))
        renew = page.get_by_role("button", name="1 new on this page: show")
        expect(renew).to_be_visible()
        assert rows(page) == before
        renew.click()
        expect(page.get_by_test_id("adapter-a-first")).to_be_visible()
        expect(renew).to_be_hidden()


def middle(page: Page, row: str) -> tuple[float, float]:
    box = page.get_by_test_id(row).bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
