"""The browser and the real server that the tests of the console share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from integration.browser import started_browser
from integration.console.local import LocalServer, local_server
from integration.console.pages import watched_page
from integration.console.real_server import KEYS, RealServer, build_model
from tests.server.tiny_server import TinyClient

ELSEWHERE = "attacker.example"
"""A name of another site, which leads to this machine."""
Open = Callable[..., Page]
"""(label of a key or None, place, **looks) -> the console of the real server in a page that must not complain."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Ended with the last test here: its event loop would be in the way of others."""
    with started_browser(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1") as browser:
        yield browser


@pytest.fixture(scope="package")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("console")
    server = RealServer(build_model(folder / "model"), folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def admin(real: RealServer) -> Iterator[TinyClient]:
    """The real server's HTTP API; the test's adapters are removed at the end."""
    client = TinyClient(real.url, KEYS["admin"])
    yield client
    names = [each["name"] for each in client.http.get("/v1/adapters?limit=1000").json()["data"]]
    client.remove(*names)
    client.close()


@pytest.fixture
def open_console(browser: Browser, real: RealServer) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_page(label: str | None = "admin", place: str = "", **looks: Any) -> Page:
            key = None if label is None else KEYS[label]
            return stack.enter_context(watched_page(browser, real.url, key, place=place, **looks))

        yield open_page


@pytest.fixture(scope="package")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """5,000 adapters on the fake engine, with keys: a real one takes minutes to get so many."""
    with local_server(tmp_path_factory.mktemp("many"), names=5000, has_keys=True) as server:
        yield server
