"""Takes a picture of the console in a real browser, and says what the page complained about.

    python -m integration.screenshot http://127.0.0.1:8000 OUT.png [--dark] [--width 390] [--hash '#/adapters']
        [--key KEY] [--do STEP ...]

A step is `click TARGET`, `fill TARGET=TEXT`, `press KEY`, `wait TEXT` or `sleep SECONDS`. A TARGET is a selector of
Playwright (`button:has-text("Upload")`, `#key`, `role=tab[name="Watch"]`), TEXT a part of what the page must show.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Page

from integration.browser import HEIGHT, WIDTH, opened_page, started_browser

SETTLE_MS = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--full", action="store_true", help="the whole page, not only what the window shows")
    parser.add_argument("--hash", default="", help="the view, like '#/adapters/poet'")
    parser.add_argument("--key", help="the key of the tab")
    parser.add_argument("--do", action="append", default=[], metavar="STEP", help="before the picture; repeatable")
    args = parser.parse_args()
    with (
        started_browser() as browser,
        opened_page(browser, args.key, dark=args.dark, width=args.width, height=args.height) as page,
    ):
        page.on("console", complain)
        page.on("pageerror", lambda error: print(f"page error: {error}", file=sys.stderr))
        page.goto(args.url.rstrip("/") + "/" + args.hash)
        page.wait_for_timeout(SETTLE_MS)
        for step in args.do:
            take(page, step)
        if args.do:
            page.wait_for_timeout(SETTLE_MS)
        wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wider > 0:
            print(f"the page is {wider} px wider than its window", file=sys.stderr)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=args.output, full_page=args.full)
    print(args.output)


def take(page: Page, step: str) -> None:
    """Take one step. Raises SystemExit for an unknown one."""
    verb, _, rest = step.partition(" ")
    if verb == "click":
        page.locator(rest).first.click(timeout=5000)
    elif verb == "fill":
        target, _, text = rest.rpartition("=")
        page.locator(target).first.fill(text, timeout=5000)
    elif verb == "press":
        page.keyboard.press(rest)
    elif verb == "wait":
        page.get_by_text(rest).first.wait_for(timeout=10000)
    elif verb == "sleep":
        page.wait_for_timeout(1000 * float(rest))
    else:
        raise SystemExit(f"found the step {step!r}, expected click, fill, press, wait or sleep")


def complain(message: ConsoleMessage) -> None:
    if message.type in ("error", "warning"):
        print(f"console {message.type}: {message.text}", file=sys.stderr)


if __name__ == "__main__":
    main()
