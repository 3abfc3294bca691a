"""Tiny bases for the tests of training, built once."""

from pathlib import Path

import pytest

from tests.training import tiny_base


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build("olmoe", tmp_path_factory.mktemp("bases") / "olmoe")


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build("mixtral", tmp_path_factory.mktemp("bases") / "mixtral")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.write_lines(tmp_path_factory.mktemp("data") / "sums.jsonl", tiny_base.additions(60))
