"""5,000 adapters: the table asks for one page at a time, and the page stays small. On the fake engine."""

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from integration.console.local import LocalServer, key
from integration.console.pages import go, watched_page

PAGE = 50
MOST_ELEMENTS = 6000
MOST_BYTES = 100_000
"""Of one answer that the table asks for."""


def rows(page: Page) -> list[str]:
    return page.locator("table.adapters tbody .name").all_inner_texts()


def named(many: LocalServer, **query: str | int) -> list[str]:
    headers = {"Authorization": f"Bearer {key('admin')}"}
    found = httpx.get(f"{many.url}/v1/adapters", params={"limit": PAGE, **query}, headers=headers).json()
    return [each["name"] for each in found["data"]]


def test_search_sort_and_pages_are_the_apis(browser: Browser, many: LocalServer) -> None:
    with watched_page(browser, many.url, key("admin")) as page:
        sizes: list[int] = []
        page.on("response", lambda response: "/v1/adapters?" in response.url and sizes.append(len(response.body())))
        total = page.locator("#adapters-total")
        expect(total).to_have_text("5,000")
        expect(page.locator("#adapters-range")).to_have_text("1\u201350 of 5,000")
        assert rows(page) == named(many)
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#adapters-range")).to_have_text("51\u2013100 of 5,000")
        assert rows(page) == named(many, offset=PAGE)
        for head, sort in (("Rows", "rows"), ("Last used", "last_used"), ("Uploaded", "created")):
            page.get_by_role("columnheader", name=head).get_by_role("button").click()
            expect(page.get_by_role("columnheader", name=head)).to_have_attribute("aria-sort", "descending")
            page.wait_for_function(
                "busy => !document.querySelector('.table-frame').hasAttribute('aria-busy')", arg=None
            )
            assert rows(page) == named(many, sort=f"-{sort}")
        search = page.get_by_label("Search names and descriptions")
        search.fill("LAW")
        expect(total).to_have_text("1 found")
        assert rows(page) == ["contract-law-de"]
        search.fill("nothing has this")
        expect(page.get_by_text("No adapter's name or description has")).to_be_visible()
        page.get_by_role("button", name="Show all").click()
        expect(total).to_have_text("5,000")
        search.fill("support-")
        expect(total).to_have_text(f"{len(named(many, search='support-', limit=1000))} found")
        assert sizes and max(sizes) < MOST_BYTES, sizes


def test_the_page_stays_small(browser: Browser, many: LocalServer) -> None:
    count = "document.getElementsByTagName('*').length"
    with watched_page(browser, many.url, key("admin")) as page:
        expect(page.locator("#adapters-total")).to_have_text("5,000")
        began = page.evaluate(count)
        for _ in range(5):
            page.get_by_role("button", name="Next").click()
        expect(page.locator("#adapters-range")).to_have_text("251\u2013300 of 5,000")
        for name in ("many-versions", "pirate", "json"):
            go(page, f"#/adapters/{name}")
            expect(page.get_by_role("heading", name=name)).to_be_visible()
        go(page, "#/adapters")
        expect(page.locator("#adapters-total")).to_have_text("5,000")
        assert page.evaluate(count) < min(MOST_ELEMENTS, 1.5 * began)


def test_150_versions_are_shown_some_at_a_time(browser: Browser, many: LocalServer) -> None:
    with watched_page(browser, many.url, key("admin"), place="#/adapters/many-versions") as page:
        versions = page.locator("table.versions tbody tr")
        expect(versions).to_have_count(25)
        expect(versions.first).to_contain_text("@150")
        page.get_by_role("button", name="Show more").click()
        expect(versions).to_have_count(125)


@pytest.mark.parametrize(
    "name", ["x-script", "x-image", "x-javascript-url", "x-directions", "x-controls", "x-long-word"]
)
def test_hostile_descriptions_are_text(browser: Browser, many: LocalServer, name: str) -> None:
    headers = {"Authorization": f"Bearer {key('alice')}"}
    said = httpx.get(f"{many.url}/v1/adapters/{name}", headers=headers).json()["versions"][-1]["description"]
    with watched_page(browser, many.url, key("alice"), place=f"#/adapters/{name}") as page:
        shown = page.locator(".one-description").first
        expect(shown).to_be_visible()
        text = shown.inner_text()
        plain = "".join(character if character.isascii() and character.isprintable() else " " for character in said)
        assert [word for word in plain.split() if word not in text] == []
        assert not {character for character in text if character in "\u0000\u001b\u202e\u202c"}
        assert page.locator("main script, main img, main a[href^='javascript']").count() == 0
