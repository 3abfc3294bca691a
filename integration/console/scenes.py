"""What there is to see of the console: places and the steps that lead there, over the names of `contents.py`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page, expect

from integration.console.pages import drop
from tests.server.fakes import BASE
from tests.synthetic import write_adapter


def _nothing(page: Page, folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Scene:
    """label: of the key. ready: what is shown once the scene's place is loaded. steps(page, folder for files)."""

    place: str
    ready: str
    steps: Callable[[Page, Path], None] = _nothing
    label: str | None = "admin"


def button(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).first.click()


def search_in_vain(page: Page, _: Path) -> None:
    page.get_by_label("Search names and descriptions").fill("nothing has this")
    expect(page.get_by_text("No adapter's name or description has")).to_be_visible()


def draft(page: Page, folder: Path) -> None:
    drop(page, page.locator("main"), write_adapter(folder / "fresh", BASE, 500))
    expect(page.get_by_role("dialog").get_by_label("Name", exact=True)).to_have_value("fresh")


def refused(page: Page, folder: Path) -> None:
    made = write_adapter(folder / "broken", BASE, 501)
    values = json.loads((made / "adapter_config.json").read_text())
    values |= {"bottleneck": 0, "num_experts": "four", "<b>rank</b>": 8}
    (made / "adapter_config.json").write_text(json.dumps(values))
    drop(page, page.locator("main"), made)
    button(page, "Upload")
    expect(page.get_by_role("region", name="Uploads")).to_contain_text("nothing was stored")


def uploaded(page: Page, folder: Path) -> None:
    drop(page, page.locator("main"), write_adapter(folder / "fresh", BASE, 502))
    button(page, "Upload")
    expect(page.get_by_role("region", name="Uploads").get_by_role("link", name="Show it")).to_be_visible()


def press(name: str) -> Callable[[Page, Path], None]:
    def steps(page: Page, _: Path) -> None:
        button(page, name)
        expect(page.get_by_role("dialog").first).to_be_visible()

    return steps


def ask(page: Page, _: Path) -> None:
    page.get_by_label("Prompt", exact=True).fill("Which clause of the treaty is about the harbour?")
    button(page, "Ask")
    for column in page.locator("section.column").all():
        expect(column.locator("dd").nth(3)).to_have_text("stop")


def ask_for_the_code(page: Page, folder: Path) -> None:
    ask(page, folder)
    page.get_by_role("button", name="Code of the request to pirate").click()
    expect(page.get_by_role("dialog").locator("pre").first).to_be_visible()


def as_tables(page: Page, _: Path) -> None:
    for switch in page.get_by_role("button", name="as a table").all():
        switch.click()


def metrics_are_there(page: Page, _: Path) -> None:
    expect(page.locator("dl.numbers dd").first).not_to_have_text("\u2013")


ROW = "table.adapters tbody tr"
ASKED = "#/playground?model=base&model=pirate&model=poet"
SCENES = {
    "sign in": Scene("", "text=This server asks for a key", label=None),
    "adapters": Scene("#/adapters", ROW),
    "adapters of an API key": Scene("#/adapters", ROW, label="alice"),
    "no match": Scene("#/adapters", ROW, search_in_vain),
    "upload": Scene("#/adapters", ROW, draft),
    "upload by buttons": Scene("#/adapters", ROW, press("Upload an adapter")),
    "uploaded": Scene("#/adapters", ROW, uploaded),
    "refused upload": Scene("#/adapters", ROW, refused),
    "adapter": Scene("#/adapters/pirate", "[data-testid=version-3]"),
    "adapter with many versions": Scene("#/adapters/many-versions", "[data-testid=version-150]"),
    "adapter that fails": Scene("#/adapters/other-base", "[data-testid=version-2]"),
    "hostile description": Scene("#/adapters/x-controls", "[data-testid=version-1]"),
    "no such adapter": Scene("#/adapters/nothing", "text=There is no such adapter"),
    "roll back": Scene("#/adapters/json", "[data-testid=version-4]", press("Roll back version 1")),
    "details": Scene("#/adapters/json", "[data-testid=version-4]", press("Details of version 2")),
    "delete": Scene("#/adapters/json", "[data-testid=version-4]", press("Delete")),
    "who may use it": Scene("#/adapters/alice-only", "[data-testid=version-2]", press("Who may use it")),
    "key": Scene("#/adapters", ROW, press("Key: admin")),
    "playground": Scene(ASKED, "section.column >> nth=2", ask),
    "model to add": Scene("#/playground", "section.column", press("Add a model")),
    "code": Scene(ASKED, "section.column >> nth=2", ask_for_the_code),
    "watch": Scene("#/watch", "text=Busiest adapters", metrics_are_there),
    "watch as tables": Scene("#/watch", "text=Busiest adapters", as_tables),
    "watch one": Scene("#/watch/pirate", "text=How evenly the experts are used"),
    "watch with the metrics key": Scene("#/watch", "text=Busiest adapters", metrics_are_there, label="metrics"),
}


def show(page: Page, scene: Scene, folder: Path) -> None:
    """Take the steps; the page is at the scene's place already."""
    page.locator(scene.ready).first.wait_for()
    scene.steps(page, folder)
