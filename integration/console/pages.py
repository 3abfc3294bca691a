"""Pages of the console under watch: what they complain about is collected, and what must never happen is noticed."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect

from integration.browser import KEY_ITEM, opened_page
from integration.fetch import JS
from tests.server.processes import LIMIT_S

LIMIT_MS = LIMIT_S * 1000
AXE = JS / "node_modules" / "axe-core" / "axe.min.js"
WATCH = """
window.owned = (...found) => reportToTest("script", JSON.stringify(found));
document.addEventListener("securitypolicyviolation", (event) =>
  reportToTest("policy", [event.violatedDirective, event.blockedURI, event.sourceFile, event.lineNumber].join(" ")));
"""
EXPECTED = ("Failed to load resource", "net::ERR_")
"""What the browser itself writes about an error status or a server that is not there."""

expect.set_options(timeout=LIMIT_MS)


@dataclass
class Complaints:
    """What was wrong with a page: scripts that ran, violations of its policy, exceptions, errors on its console."""

    found: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.context.expose_function("reportToTest", lambda kind, text: self.found.append(f"{kind}: {text}"))
        page.context.add_init_script(WATCH)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.found.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (self.found.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(part in message.text for part in EXPECTED):
            self.found.append(f"console: {message.text}")


@contextmanager
def watched_page(
    browser: Browser, url: str, key: str | None = None, *, place: str = "", **looks: Any
) -> Iterator[Page]:
    """The console at `url`, at the hash `place`. Raises AssertionError at the end if the page complained."""
    complaints = Complaints()
    with opened_page(browser, key, **looks) as page:
        complaints.watch(page)
        page.set_default_timeout(LIMIT_MS)
        page.goto(f"{url}/{place}")
        yield page
        title = page.title()
    assert not complaints.found, complaints.found
    assert "owned" not in title, title


def go(page: Page, place: str) -> None:
    """Show another view, as a link does."""
    page.evaluate("place => { location.hash = place; }", place)


def drop(page: Page, target: Locator, *paths: Path) -> None:
    """Drag files or folders from outside the browser, and drop them on the target."""
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    assert box is not None
    where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + min(box["height"] / 2, 200)}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for step in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": step, **where, "data": data})
    session.detach()


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it is now."""
    page.evaluate(AXE.read_text(encoding="utf-8") + "; null")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: "
        + "; ".join(" ".join(map(str, node["target"])) for node in each["nodes"][:5])
        for each in found
    ]


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return wider


def stored_key(page: Page) -> str | None:
    """The key that the tab holds."""
    found: str | None = page.evaluate("name => sessionStorage.getItem(name)", KEY_ITEM)
    return found


class RawTabs:
    """Tabs of one window that are really hidden when another is in front: Playwright shows all of its own at once."""

    def __init__(self, browser: Browser) -> None:
        self._session = browser.new_browser_cdp_session()
        self._context = self._session.send("Target.createBrowserContext")["browserContextId"]

    def open(self, url: str) -> str:
        """Open a tab in front; its id."""
        target = {"url": url, "browserContextId": self._context}
        return str(self._session.send("Target.createTarget", target)["targetId"])

    def bring_to_front(self, tab: str) -> None:
        self._session.send("Target.activateTarget", {"targetId": tab})

    def close(self) -> None:
        self._session.send("Target.disposeBrowserContext", {"browserContextId": self._context})
        self._session.detach()


def names_in(values: Sequence[dict[str, Any]]) -> list[str]:
    return [str(value["name"]) for value in values]


def as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
