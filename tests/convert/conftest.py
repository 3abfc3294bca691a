"""The tiny bases that the authors' checkpoints are imported for."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(kind, folder / kind) for kind in ("olmoe", "mixtral")}
