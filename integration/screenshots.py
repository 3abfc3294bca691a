"""Takes the pictures of docs/console: every view, light, dark and narrow, over the demo with its traffic.

    python -m integration.screenshots [--names 5000] [--seconds 70] [OUTPUT]

--seconds: how long the charts gather points before they are taken.
"""

import argparse
import time
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page

from integration.browser import opened_page, started_browser
from integration.console.local import key
from integration.console.scenes import SCENES, show
from tests.server.processes import ServerProcess, free_port, launch

PICTURES = Path(__file__).parents[1] / "docs" / "console"
VIEWS = {
    "adapters": "#/adapters?sort=-last_used",
    "adapter": "#/adapters/pirate",
    "playground": SCENES["playground"].place,
}
LOOKS: dict[str, dict[str, int | bool]] = {
    "light": {"width": 1280, "height": 860},
    "dark": {"width": 1280, "height": 860, "dark": True},
    "narrow": {"width": 390, "height": 844},
}
COLOURS, FREQUENT = 256, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=PICTURES)
    parser.add_argument("--names", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=70.0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, started_browser() as browser:
        server = demo(args.names, Path(folder))
        try:
            take_all(browser, server.url, args.output, args.seconds, Path(folder))
        finally:
            server.stop()


def demo(names: int, folder: Path) -> ServerProcess:
    port = free_port()
    command = ["-m", "integration.console_demo", "--port", str(port), "--names", str(names), "--keys", "--friendly"]
    server = launch(command, port, folder / "demo.log")
    server.wait_until("/ready")
    return server


def take_all(browser: Browser, url: str, output: Path, seconds: float, folder: Path) -> None:
    with ExitStack() as stack:
        watching = {
            look: stack.enter_context(opened_page(browser, key("admin"), **looks)) for look, looks in LOOKS.items()
        }
        for page in watching.values():
            page.goto(f"{url}/#/watch")
            page.get_by_text("1 min", exact=True).click()
        began = time.monotonic()
        time.sleep(seconds / 2)  # until adapters have come and gone
        for view, place in VIEWS.items():
            for look, looks in LOOKS.items():
                with opened_page(browser, key("admin"), **looks) as page:
                    page.goto(f"{url}/{place}")
                    show(page, SCENES[view], folder)
                    page.wait_for_timeout(5000)
                    keep(page, output / f"{view}-{look}.png")
        while time.monotonic() - began < seconds:
            watching["light"].wait_for_timeout(1000)
        for look, page in watching.items():
            keep(page, output / f"watch-{look}.png")


def keep(page: Page, file: Path) -> None:
    """Write what the window shows in few colours, the frequent and the odd ones: the repository is to stay small."""
    with Image.open(BytesIO(page.screenshot())) as taken:
        pixels = np.asarray(taken.convert("RGB"))
    colours, which, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette = colours[np.argsort(-counts)[:FREQUENT]].astype(int)
    distances = ((colours[:, None].astype(int) - palette[None]) ** 2).sum(axis=-1)
    while len(palette) < COLOURS:
        odd = colours[distances.min(axis=1).argmax()].astype(int)
        palette = np.vstack([palette, odd])
        distances = np.column_stack([distances, ((colours.astype(int) - odd) ** 2).sum(axis=-1)])
    indices = distances.argmin(axis=1)[which.reshape(-1)].reshape(pixels.shape[:2])
    picture = Image.fromarray(indices.astype(np.uint8), "P")
    picture.putpalette(palette.astype(np.uint8).tobytes())
    picture.save(file, optimize=True)
    print(f"{file} ({file.stat().st_size // 1000} kB)", flush=True)


if __name__ == "__main__":
    main()
