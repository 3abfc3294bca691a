"""The adapters' view in a real browser, before a real server: uploads by drop, versions, pins, rights, deletes."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Locator, Page, expect

from integration.console.conftest import Open
from integration.console.pages import drop, go
from integration.console.real_server import RealServer, adapter
from tests.server.processes import wait_until
from tests.server.tiny_server import BASE_NAME, TinyClient, long_prompt

SCRIPT = "<script>owned('name')</script>"
IMAGE = "<img src=x onerror=\"owned('violation')\">"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def number_of(response: object) -> int:
    return int(response.headers["location"].rpartition("/")[2])  # type: ignore[attr-defined]


@pytest.fixture
def poet(admin: TinyClient, tmp_path: Path) -> list[int]:
    """The versions of `poet`, which differ in more than their weights; the last is active."""
    folders = [
        adapter(tmp_path / "first", 1, description="The first."),
        adapter(tmp_path / "second", 2, bottleneck=8, description="The second."),
    ]
    return [number_of(admin.upload("poet", folder)) for folder in folders]


def uploads(page: Page) -> Locator:
    return page.get_by_role("region", name="Uploads")


def version(page: Page, number: int) -> Locator:
    return page.get_by_test_id(f"version-{number}")


def send(page: Page, name: str | None = None) -> None:
    """Send what the upload's dialog holds."""
    dialog = page.get_by_role("dialog")
    if name is not None:
        dialog.get_by_label("Name", exact=True).fill(name)
    dialog.get_by_role("button", name=re.compile("^Upload")).click()


def two_files(folder: Path) -> list[Path]:
    return [folder / CONFIG, folder / WEIGHTS]


def whole_folder(folder: Path) -> list[Path]:
    """As a trainer leaves it: with much that is not the adapter."""
    (folder / "checkpoint-100").mkdir()
    for file in (CONFIG, WEIGHTS):
        shutil.copy(folder / file, folder / "checkpoint-100" / file)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"0" * 1000)
    return [folder]


def archive(folder: Path) -> list[Path]:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as packed:
        for path in two_files(folder):
            packed.write(path, f"{folder.name}/{path.name}")
    return [file]


@pytest.mark.parametrize("given", [two_files, archive, whole_folder])
def test_upload_by_drop(
    given: Callable[[Path], list[Path]], admin: TinyClient, open_console: Open, tmp_path: Path
) -> None:
    page = open_console("admin")
    expect(page.get_by_role("heading", name="Adapters", exact=True)).to_be_visible()
    drop(page, page.locator("main"), *given(adapter(tmp_path / "fresh", 7)))
    send(page, "dropped")
    expect(uploads(page)).to_contain_text(re.compile(r"dropped@\d+ is new and active"))
    expect(page.get_by_test_id("adapter-dropped")).to_be_visible()
    assert admin.adapter("dropped")["active"] is not None
    uploads(page).get_by_role("link", name="Try it in the playground").click()
    expect(page.get_by_role("region", name=re.compile(r"^dropped@\d+$"))).to_be_visible()


def test_the_same_content_is_no_new_version(admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "again", 8)
    number = number_of(admin.upload("again", folder))
    page = open_console("admin", "#/adapters/again")
    expect(version(page, number)).to_be_visible()
    drop(page, page.locator("main"), *two_files(folder))
    send(page)
    expect(uploads(page)).to_contain_text(f"This content already was again@{number}")
    assert len(admin.adapter("again")["versions"]) == 1


def test_every_violation_of_a_broken_upload_is_listed_as_text(
    admin: TinyClient, open_console: Open, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "broken", 9)
    values = json.loads((folder / CONFIG).read_text())
    values |= {"bottleneck": 0, "variant": "Q", IMAGE: 1, "num_experts": "four"}
    (folder / CONFIG).write_text(json.dumps(values))
    files = {"config": (folder / CONFIG).read_bytes(), "weights": (folder / WEIGHTS).read_bytes()}
    refused = admin.http.post("/v1/adapters", data={"name": "broken"}, files=files).json()["error"]
    page = open_console("admin")
    expect(page.get_by_role("heading", name="Adapters", exact=True)).to_be_visible()
    drop(page, page.locator("main"), folder)
    send(page, "broken")
    items = uploads(page).locator(".violations > li")
    expect(items).to_have_count(len(refused["violations"]))
    assert len(refused["violations"]) >= 4
    shown = uploads(page).locator(".violations").inner_text()
    for key in ("bottleneck", "variant", "num_experts", IMAGE):
        assert key in shown, shown
    expect(uploads(page)).to_contain_text("nothing was stored")
    assert page.locator("main img").count() == 0
    assert admin.http.get("/v1/adapters/broken").status_code == 404


def test_a_name_that_cannot_be_is_refused_in_the_dialog(open_console: Open, tmp_path: Path) -> None:
    page = open_console("admin")
    expect(page.get_by_role("heading", name="Adapters", exact=True)).to_be_visible()
    drop(page, page.locator("main"), adapter(tmp_path / "named", 10))
    for name in (SCRIPT, "", BASE_NAME, "x" * 64):
        send(page, name)
        expect(page.get_by_role("dialog").get_by_label("Name", exact=True)).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(uploads(page)).to_be_hidden()


def test_what_is_no_adapter_is_not_sent(open_console: Open, tmp_path: Path) -> None:
    page = open_console("admin")
    expect(page.get_by_role("heading", name="Adapters", exact=True)).to_be_visible()
    stray = tmp_path / "<img src=x onerror=owned(1)>.bin"
    stray.write_bytes(b"0")
    drop(page, page.locator("main"), stray)
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("onerror=owned(1)")
    expect(page.get_by_role("dialog").get_by_role("button", name=re.compile("^Upload$"))).to_be_hidden()


def test_roll_back_and_activate_with_the_comparison(admin: TinyClient, poet: list[int], open_console: Open) -> None:
    old, new = poet
    page = open_console("admin", "#/adapters/poet")
    expect(version(page, new)).to_contain_text("active")
    version(page, old).get_by_role("button", name="Roll back").click()
    dialog = page.get_by_role("dialog", name=f"Roll back to poet@{old}")
    compared = dialog.get_by_role("row", name=re.compile("^Bottleneck"))
    expect(compared.get_by_role("cell")).to_have_text(["8", "16"])
    expect(dialog.get_by_role("row", name=re.compile("^Description")).get_by_role("cell")).to_have_text(
        ["The second.", "The first."]
    )
    dialog.get_by_role("button", name="Roll back").click()
    expect(dialog).to_have_count(0)
    expect(version(page, old)).to_contain_text("active")
    assert admin.adapter("poet")["active"] == old
    version(page, new).get_by_role("button", name="Activate").click()
    page.get_by_role("dialog").get_by_role("button", name="Activate").click()
    expect(version(page, new)).to_contain_text("active")
    wait_until(lambda: admin.adapter("poet")["active"] == new)


def test_somebody_else_was_faster(admin: TinyClient, poet: list[int], open_console: Open) -> None:
    old, new = poet
    page = open_console("admin", "#/adapters/poet")
    version(page, old).get_by_role("button", name="Roll back").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("row", name=re.compile("^Bottleneck"))).to_be_visible()
    admin.change("poet", active=None)
    dialog.get_by_role("button", name="Roll back").click()
    expect(dialog.get_by_role("alert").filter(visible=True).first).to_contain_text(f"@{new}")
    assert admin.adapter("poet")["active"] is None


def test_delete_shows_the_drain(admin: TinyClient, poet: list[int], open_console: Open, real: RealServer) -> None:
    old, _ = poet
    page = open_console("admin", "#/adapters/poet")
    expect(version(page, old)).to_be_visible()
    admin.complete(f"poet@{old}", long_prompt(1, 100), 1)
    answered: list[list[int]] = []
    stream = Thread(target=lambda: answered.append(admin.stream_tokens(f"poet@{old}", long_prompt(1, 100), 250)))
    with real.engine_still():
        stream.start()
        wait_until(lambda: any(v["requests_running"] for v in admin.adapter("poet")["versions"]))
        version(page, old).get_by_role("button", name=f"Details of version {old}").click()
        page.get_by_role("button", name="Delete this version").click()
        dialog = page.get_by_role("dialog", name=f"Delete poet@{old}")
        expect(dialog).to_contain_text("1 request runs now")
        dialog.get_by_role("button", name="Delete", exact=True).click()
        drain = page.get_by_test_id(f"drain-{old}")
        expect(drain).to_contain_text("1 request still runs")
        expect(drain).to_contain_text("It may finish until")
        expect(version(page, old)).to_contain_text("draining")
    expect(drain).to_have_count(0)
    expect(version(page, old)).to_have_count(0)
    stream.join()
    assert len(answered[0]) == 250
    assert [each["version"] for each in admin.adapter("poet")["versions"]] == poet[1:]


def test_a_whole_adapter_is_deleted_once_its_name_is_typed(
    admin: TinyClient, poet: list[int], open_console: Open
) -> None:
    page = open_console("admin", "#/adapters/poet")
    page.get_by_role("button", name="Delete", exact=True).click()
    dialog = page.get_by_role("dialog", name="Delete poet")
    delete = dialog.get_by_role("button", name="Delete", exact=True)
    expect(delete).to_be_disabled()
    dialog.get_by_label(re.compile("^Type poet")).fill("poe")
    expect(delete).to_be_disabled()
    dialog.get_by_label(re.compile("^Type poet")).fill("poet")
    delete.click()
    expect(page.get_by_text("It was deleted, with all its versions.")).to_be_visible()
    wait_until(lambda: admin.http.get("/v1/adapters/poet").status_code == 404)


def test_a_pinned_adapter(admin: TinyClient, poet: list[int], open_console: Open) -> None:
    page = open_console("admin", "#/adapters/poet")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.get_by_role("button", name="Unpin", exact=True)).to_be_visible()
    found = admin.adapter("poet")
    assert found["pinned"] and found["versions"][-1]["resident"] == "device"
    go(page, "#/adapters")
    row = page.get_by_test_id("adapter-poet")
    expect(row).to_contain_text("pinned")
    expect(row).to_contain_text("device")
    go(page, "#/adapters/poet")
    page.get_by_role("button", name="Unpin", exact=True).click()
    expect(page.get_by_role("button", name="Pin", exact=True)).to_be_visible()
    assert not admin.adapter("poet")["pinned"]


def test_no_room_to_pin_says_beside_what(admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    """Two of these nearly fill the pool."""
    for number in range(3):
        folder = adapter(tmp_path / f"large-{number}", 20 + number, bottleneck=64, num_experts=4)
        assert admin.upload(f"large-{number}", folder).status_code == 201
    for number in range(2):
        admin.change(f"large-{number}", pinned=True)
    page = open_console("admin", "#/adapters/large-2")
    page.get_by_role("button", name="Pin", exact=True).click()
    outcome = page.get_by_role("dialog", name="large-2 could not be pinned")
    expect(outcome).to_contain_text("device_full")
    for number in range(2):
        expect(outcome.get_by_role("link", name=f"large-{number}")).to_be_visible()
    assert not admin.adapter("large-2")["pinned"]


def test_who_may_use_it(admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    """A name keeps its keys after a delete: no other test uses this one."""
    assert admin.upload("restricted", adapter(tmp_path / "one", 1)).status_code == 201
    page = open_console("admin", "#/adapters/restricted")
    page.get_by_role("button", name="Who may use it").click()
    dialog = page.get_by_role("dialog", name="Who may use restricted")
    dialog.get_by_label("bob").check()
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_text("Only for bob")).to_be_visible()
    assert admin.adapter("restricted")["allowed_keys"] == ["bob"]
    theirs = open_console("bob")
    expect(theirs.get_by_test_id("adapter-restricted")).to_be_visible()
    others = open_console("alice")
    expect(others.get_by_text("No adapters yet")).to_be_visible()
    expect(others.get_by_test_id("adapter-restricted")).to_have_count(0)


def test_a_script_in_a_description_is_text(admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "hostile", 30, description=f"{SCRIPT} {IMAGE} javascript:owned(2) \u202e\u0007")
    number = number_of(admin.upload("hostile", folder))
    page = open_console("admin")
    row = page.get_by_test_id("adapter-hostile")
    expect(row).to_contain_text(SCRIPT)
    expect(row).to_contain_text(IMAGE)
    go(page, "#/adapters/hostile")
    expect(version(page, number)).to_contain_text(SCRIPT)
    version(page, number).get_by_role("button", name=f"Details of version {number}").click()
    expect(page.get_by_role("dialog")).to_contain_text(IMAGE)
    page.keyboard.press("Escape")
    go(page, "#/playground")
    page.get_by_role("button", name="Add a model").click()
    expect(page.get_by_role("dialog")).to_contain_text(SCRIPT)
    page.keyboard.press("Escape")
    for place in (
        f"#/adapters/{SCRIPT}",
        f"#/adapters?search={IMAGE}",
        f"#/watch/{IMAGE}",
        f"#/playground?model={SCRIPT}",
    ):
        go(page, place)
        expect(page.get_by_role("main")).to_contain_text("owned(")
        assert page.locator("main script, main img").count() == 0
