"""The one real server that the integration tests share."""

from collections.abc import Iterator

import pytest

from integration.target import Target, running, started


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server-url", help="use this running server (its keys: integration/target.py)")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    url = request.config.getoption("--server-url")
    if url:
        yield running(url)
        return
    with started(tmp_path_factory.mktemp("server")) as target:
        yield target
