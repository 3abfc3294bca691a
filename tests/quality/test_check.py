"""`make quality-check`: a tiny cell end to end, and a pretraining that is killed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import check, wordnet
from benchmarks.quality.base import pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as `perft train` is told, before and after
    yield check.tiny_cell(tmp_path_factory.mktemp("quality") / "cell")
    torch.set_num_threads(threads)


def test_a_tiny_cell_runs_end_to_end(folder: Path) -> None:
    """Both methods learn: their loss is lower than the base's."""
    found = {each["method"]: each for each in map(json.loads, (
        file.read_text() for file in (folder / "results" / "runs").glob("*.json")
    ))}  # fmt: skip
    assert set(found) == {"base", *check.METHODS}
    for method in check.METHODS:
        assert found[method]["test"]["loss"] < found["base"]["test"]["loss"]
        assert found[method]["test"]["examples"] == 20
    page = (folder / "quality.md").read_text()
    assert "| 4 | R, Top2/4 |" in page
    assert {file.name for file in folder.glob("*.svg")} == {"quality-efficiency.svg", "quality-experts.svg"}


def test_a_pretraining_that_was_stopped_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    synsets = wordnet.synsets(check.SYNSETS)
    assert pretrain(synsets, check.RECIPE, tmp_path / "base", tmp_path / "work", until=12) is None
    assert not (tmp_path / "base").exists()
    with pytest.raises(ValueError, match="another recipe's pretraining"):
        pretrain(synsets, replace(check.RECIPE, learning_rate=1e-4), tmp_path / "base", tmp_path / "work")
    assert pretrain(synsets, check.RECIPE, tmp_path / "base", tmp_path / "work") is not None
    whole, resumed = (load_file(each / "model.safetensors") for each in (folder / "base", tmp_path / "base"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
