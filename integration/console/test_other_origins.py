"""A page of another origin can do nothing: it reads nothing, and nothing changes, with keys and without."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from integration.browser import opened_page
from integration.console.conftest import ELSEWHERE
from integration.console.local import LocalServer, key, local_server
from integration.console.other_origin import other_origin
from integration.console.pages import LIMIT_MS
from tests.server.fakes import BASE
from tests.synthetic import write_adapter

HOSTS = {"another site": ELSEWHERE, "another port": "127.0.0.1", "another name": "localhost"}
KNOWN = "pirate"
COUNTED = ("perft_adapter_requests_total", "perft_uploads_total")
ASKED_FROM_INSIDE = """async () => {
  const found = {};
  const chat = '{"model": "pirate", "messages": [{"role": "user", "content": "x"}]}';
  for (const [method, path, body] of [["GET", "/v1/adapters"], ["GET", "/metrics"], ["GET", "/console/metrics"],
      ["DELETE", "/v1/adapters/pirate"], ["PATCH", "/v1/adapters/pirate", '{"active": null}'],
      ["POST", "/v1/chat/completions", chat]]) {
    const headers = body ? {"Content-Type": "application/json"} : {};
    found[`${method} ${path}`] = (await fetch(path, {method, body, headers})).status;
  }
  found.session = await (await fetch("/console/session")).json();
  return found;
}"""


@pytest.fixture(params=[False, True], ids=["without keys", "with keys"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalServer]:
    """On the fake engine; access control is the same code."""
    with local_server(tmp_path, has_keys=request.param) as server:
        yield server


@pytest.fixture
def port() -> Iterator[int]:
    with other_origin() as port:
        yield port


def state_of(server: LocalServer) -> Any:
    headers = {"Authorization": f"Bearer {key('admin')}"} if server.has_keys else {}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        adapters = client.get("/v1/adapters?limit=1000").json()
        metrics = client.get("/metrics").text
    counted = [line for line in metrics.splitlines() if line.startswith(COUNTED) and not line.endswith(" 0.0")]
    return adapters, counted


def adapter_in_text(folder: Path) -> dict[str, str]:
    made = write_adapter(folder, BASE, 99)
    files = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {name: base64.b64encode((made / file).read_bytes()).decode() for name, file in files.items()}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_it_can_do_nothing(browser: Browser, server: LocalServer, port: int, host: str, tmp_path: Path) -> None:
    before = state_of(server)
    with opened_page(browser) as console:
        console.set_default_timeout(LIMIT_MS)
        console.goto(server.url)
        if server.has_keys:
            console.get_by_label("API key, metrics key or admin key").fill(key("admin"))
            console.keyboard.press("Enter")
        expect(console.get_by_test_id(f"adapter-{KNOWN}")).to_be_visible()
        stranger = console.context.new_page()
        stranger.goto(f"http://{host}:{port}/")
        given = [server.url, {**adapter_in_text(tmp_path / "theirs"), "known": KNOWN}]
        outcomes = stranger.evaluate("([server, adapter]) => attack(server, adapter)", given)
        assert len(outcomes) > 40
        assert not {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("refused")}
        expect(console.get_by_test_id(f"adapter-{KNOWN}")).to_be_visible()
    assert state_of(server) == before


def test_a_name_that_leads_here_is_refused_without_keys(browser: Browser, tmp_path: Path) -> None:
    """DNS rebinding: for the browser the attacker's page and the server are of one origin then."""
    with local_server(tmp_path) as server, opened_page(browser) as page:
        before = state_of(server)
        page.goto(f"http://{ELSEWHERE}:{server.port}/")
        found = page.evaluate(ASKED_FROM_INSIDE)
        session = found.pop("session")
        assert set(found.values()) == {403}, found
        assert session["may"] == {"use": False, "change": False, "watch": False} and session["base"] == []
        assert state_of(server) == before
