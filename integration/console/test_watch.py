"""Watch in a real browser, before a real server: it shows what the server did, for all and for one adapter."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from playwright.sync_api import Page, expect

from integration.console.conftest import Open
from integration.console.pages import go
from integration.console.real_server import RealServer, adapter
from tests.server.tiny_server import TinyClient, long_prompt


@pytest.fixture
def poet(admin: TinyClient, tmp_path: Path) -> None:
    assert admin.upload("poet", adapter(tmp_path / "poet", 1)).status_code == 201


@contextmanager
def asked(client: TinyClient, *models: str) -> Iterator[None]:
    """Somebody asks the models again and again meanwhile."""
    ends = Event()

    def ask() -> None:
        seed = 0
        while not ends.is_set():
            for model in models:
                seed += 1
                client.stream_tokens(model, long_prompt(seed, 40), 30)

    thread = Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def is_positive(page: Page, name: str) -> None:
    value = page.locator("dl.numbers .tile", has_text=name).locator("dd").first
    expect(value).to_have_text(re.compile(r"[1-9]"))


@pytest.mark.usefixtures("poet")
def test_all_together_then_one(admin: TinyClient, open_console: Open, real: RealServer) -> None:
    page = open_console("metrics")
    with asked(admin, "poet", "tiny"):
        for name in ("Tokens/s", "Requests/s", "First token, p95", "Between tokens, p95", "Pool rows"):
            is_positive(page, name)
        busiest = page.get_by_role("region", name="Busiest adapters", exact=True)
        expect(busiest.get_by_role("row", name=re.compile("^poet"))).to_be_visible()
        expect(busiest.get_by_role("row", name=re.compile("^poet")).get_by_role("cell").nth(1)).to_have_text(
            re.compile("[1-9]")
        )
        for chart in ("Tokens per second", "Time to first token", "Inter-token latency", "Rows of the device pool"):
            region = page.get_by_role("region", name=chart, exact=True)
            expect(region.locator(".legend-value").first).to_have_text(re.compile(r"\d"))
            expect(region.locator("svg path").first).to_be_attached()
        busiest.get_by_role("link", name="poet").click()
        expect(page).to_have_url(re.compile("#/watch/poet$"))
        is_positive(page, "Tokens/s")
        experts = page.get_by_role("region", name="Use of the experts")
        experts.get_by_text("As a table").click()
        expect(experts.locator("tbody tr")).to_have_count(4)
        expect(experts).to_contain_text(re.compile(r"Busiest: expert \d, \d"))
    said = admin.metrics()
    assert 'perft_expert_tokens_total{adapter="poet"' in said


@pytest.mark.usefixtures("poet")
def test_errors_loads_and_uploads_by_kind(admin: TinyClient, open_console: Open, tmp_path: Path) -> None:
    page = open_console("admin", "#/watch")
    expect(page.get_by_role("heading", name="Watch", exact=True)).to_be_visible()
    seed = 100
    uploads = page.get_by_role("region", name="Uploads per minute", exact=True)
    errors = page.get_by_role("region", name="Errors per minute", exact=True)
    for wanted in (uploads.get_by_text("created", exact=True), errors.get_by_text("HTTP 4xx")):
        while not wanted.count():
            seed += 1
            admin.upload("loaded", adapter(tmp_path / f"loaded-{seed}", seed))
            admin.http.post("/v1/completions", json={"model": "nobody", "prompt": "t5"})
            page.wait_for_timeout(1000)
    loads = page.get_by_role("region", name="Loads and evictions per minute", exact=True)
    expect(loads.get_by_text("loads", exact=True)).to_be_visible()
    go(page, "#/adapters")
    pool = page.get_by_role("main")
    expect(pool).to_contain_text(re.compile(r"rows", re.IGNORECASE))
