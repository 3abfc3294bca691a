"""Every view for everybody: axe-core finds nothing, in light and dark; a narrow window is enough; so is a keyboard.

On the fake engine, with adapters of every kind.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from integration.console.local import LocalServer, key, local_server
from integration.console.pages import overflow, violations, watched_page
from integration.console.scenes import SCENES, show
from tests.server.processes import wait_until

NARROW = 390
INSIDE = "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
ON_FOCUS = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText?.trim() ?? ''"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(tmp_path_factory.mktemp("demo"), names=60, has_keys=True) as server:
        headers = {"Authorization": f"Bearer {key('admin')}"}
        for model in ("base", "pirate", "poet", "json"):
            body = {"model": model, "messages": [{"role": "user", "content": "first"}]}
            assert httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
        yield server


def key_of(label: str | None) -> str | None:
    return None if label is None else key(label)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", SCENES)
def test_axe_finds_nothing(browser: Browser, demo: LocalServer, tmp_path: Path, name: str, is_dark: bool) -> None:
    scene = SCENES[name]
    with watched_page(browser, demo.url, key_of(scene.label), place=scene.place, dark=is_dark) as page:
        show(page, scene, tmp_path)
        assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if is_dark else "light")
        assert violations(page) == []


@pytest.mark.parametrize("name", SCENES)
def test_a_narrow_window_is_enough(browser: Browser, demo: LocalServer, tmp_path: Path, name: str) -> None:
    scene = SCENES[name]
    with watched_page(browser, demo.url, key_of(scene.label), place=scene.place, width=NARROW, height=800) as page:
        show(page, scene, tmp_path)
        assert overflow(page) == 0
        outside = page.evaluate(
            "() => [...document.querySelectorAll('dialog[open]')].some((each) => each.scrollWidth > each.clientWidth)"
        )
        assert not outside
        assert violations(page) == []


def focused(page: Page) -> str:
    found: str = page.evaluate(ON_FOCUS)
    return found


def tab_to(page: Page, name: str, press: str = "Tab") -> None:
    """Go on with the keyboard until the focus is on what is called `name`. Raises AssertionError if it never is."""
    for _ in range(150):
        page.keyboard.press(press)
        if focused(page) == name:
            return
    raise AssertionError(f"no {name!r} by {press}")


def test_the_keyboard_alone(browser: Browser, demo: LocalServer, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {key('admin')}"}

    def json_() -> dict[str, object]:
        found: dict[str, object] = httpx.get(f"{demo.url}/v1/adapters/json", headers=headers).json()
        return found

    with watched_page(browser, demo.url) as page:
        expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        page.keyboard.press("Tab")
        assert focused(page) == "Skip to content"
        page.keyboard.press("Enter")
        tab_to(page, "")  # the field, which has no text of its own
        expect(page.get_by_label("API key, metrics key or admin key")).to_be_focused()
        page.keyboard.type(key("admin"))
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("adapter-json")).to_be_visible()
        tab_to(page, "Adapters")
        tab_to(page, "Search names and descriptions")
        page.keyboard.type("follows the schema")
        page.keyboard.press("Backspace")
        for _ in range(60):
            page.keyboard.press("Backspace")
        page.keyboard.type("JSON,")
        expect(page.locator("#adapters-total")).to_have_text("1 found")
        tab_to(page, "json")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="json")).to_be_visible()
        before = json_()
        tab_to(page, "Roll back version 2")
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        assert focused(page) == "Roll back version 2" and json_() == before
        page.keyboard.press("Enter")
        expect(dialog).to_be_visible()
        tab_to(page, "Roll back")
        page.keyboard.press("Enter")
        expect(dialog).to_have_count(0)
        wait_until(lambda: json_()["active"] == 2)
        tab_to(page, "Playground", "Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
        if not page.get_by_label("Prompt", exact=True).evaluate("each => each === document.activeElement"):
            page.get_by_label("Prompt", exact=True).focus()
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        expect(page.locator(".turn-text").last).not_to_be_empty()
        tab_to(page, "Watch", "Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
        tab_to(page, "Tokens per second: a time to read")
        page.keyboard.press("End")
        expect(page.get_by_role("slider", name="Tokens per second")).to_have_attribute(
            "aria-valuetext", re.compile(r"\d:\d\d")
        )
        httpx.patch(f"{demo.url}/v1/adapters/json", json={"active": before["active"]}, headers=headers)


def test_focus_never_hides_behind_a_dialog(browser: Browser, demo: LocalServer, tmp_path: Path) -> None:
    for name in ("upload", "roll back", "details", "delete", "who may use it", "model to add", "code", "key"):
        scene = SCENES[name]
        with watched_page(browser, demo.url, key_of(scene.label), place=scene.place) as page:
            show(page, scene, tmp_path / name)
            for _ in range(30):
                page.keyboard.press("Tab")
                is_inside = page.evaluate(INSIDE)
                assert is_inside, (name, focused(page))
            page.keyboard.press("Escape")
            expect(page.get_by_role("dialog")).to_have_count(0)
