"""One S3 server for the session, and a place of every kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store import places


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with places.s3_server() as address:
        yield address


@pytest.fixture(params=places.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> places.Place:
    return places.place(request.param, tmp_path, request)


@pytest.fixture(params=places.KINDS[1:])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> places.Shared:
    found = places.place(request.param, tmp_path, request)
    assert isinstance(found, places.Shared)
    return found
