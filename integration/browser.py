"""Debian's chromium, driven by Playwright, with the fonts of `fetch.py`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Error, Page, ViewportSize, sync_playwright

from integration.fetch import CACHE, libraries, program

KEY_ITEM = "perft-key"
"""Where the page keeps its key (sessionStorage)."""
WIDTH, HEIGHT = 1280, 860


@contextmanager
def started_browser(*flags: str) -> Iterator[Browser]:
    """A browser without a window. Raises AssertionError if it was not fetched."""
    chromium = program("chromium")
    assert chromium is not None, "found no chromium: run `python integration/fetch.py chromium`"
    environment = {**os.environ, **libraries("chromium"), "FONTCONFIG_FILE": str(CACHE / "fonts.conf")}
    with sync_playwright() as playwright:
        is_sandboxed = os.geteuid() != 0
        try:
            browser = playwright.chromium.launch(
                executable_path=chromium, env=environment, args=flags, chromium_sandbox=is_sandboxed
            )
        except Error as error:  # a container may have no user namespaces for the sandbox
            if not is_sandboxed or "sandbox" not in str(error):
                raise
            browser = playwright.chromium.launch(executable_path=chromium, env=environment, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened_page(
    browser: Browser, key: str | None = None, *, dark: bool = False, width: int = WIDTH, height: int = HEIGHT
) -> Iterator[Page]:
    """A page of a browser profile of its own, which holds `key` for every page that it opens."""
    context = browser.new_context(
        viewport=ViewportSize(width=width, height=height),
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        accept_downloads=True,
    )
    try:
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem({KEY_ITEM!r}, {key!r})")
        yield context.new_page()
    finally:
        context.close()
