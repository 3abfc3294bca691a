"""What `perft import` and `perft export` write: whole or not at all, and the same after there and back."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.commands.convert import run_export, run_import
from tests.convert import authors
from tests.convert.test_import import imported, made

Command = tuple[str, Callable[[Path], int]]
FILES = {
    "import": {"adapter_config.json", "adapter_model.safetensors"},
    "export": {"config.json", "model.safetensors"},
}


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    """PERFT-E for OLMoE, imported."""
    return imported(bases, tmp_path, "olmoe", authors.write(tmp_path / "published", *made("olmoe", "E", "LoRA")))


@pytest.fixture(params=FILES)
def command(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path, adapter: Path) -> Command:
    """Its name, and how it is run for an output."""
    run, source = {"import": (run_import, tmp_path / "published"), "export": (run_export, adapter)}[request.param]
    return request.param, lambda output: run([str(source), "--base", str(bases["olmoe"]), "--output", str(output)])


@contextmanager
def no_room(size: int = 4096) -> Iterator[None]:
    """No file can be longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, run = command
    with no_room():
        assert run(tmp_path / "new" / "deep" / "output") == 1
    said = capsys.readouterr().err
    assert "cannot write" in said and "Traceback" not in said
    assert not (tmp_path / "new").exists()
    assert run(tmp_path / "new" / "deep" / "output") == 0
    assert {file.name for file in (tmp_path / "new" / "deep" / "output").iterdir()} == FILES[name]


def test_an_empty_folder_is_filled_and_stays_empty_after_a_failure(command: Command, tmp_path: Path) -> None:
    name, run = command
    output = tmp_path / "empty"
    output.mkdir()
    inode = output.stat().st_ino
    with no_room():
        assert run(output) == 1
    assert output.is_dir() and not list(output.iterdir())
    assert run(output) == 0
    assert {file.name for file in output.iterdir()} == FILES[name] and output.stat().st_ino == inode


def test_the_folder_appears_whole(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the last step leaves no output, so that the same command goes through."""
    name, run = command
    rename, seen = os.rename, []

    def observed(source: Path, target: Path) -> None:
        seen.append((Path(target), {file.name for file in Path(source).iterdir()}, Path(target).exists()))
        rename(source, target)

    monkeypatch.setattr(os, "rename", observed)
    assert run(tmp_path / "output") == 0
    assert seen == [(tmp_path / "output", FILES[name], False)]
    assert not list(tmp_path.glob(".perft-*"))
    assert (tmp_path / "output").stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_config_comes_last_into_an_empty_folder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = command
    rename, seen = os.rename, []

    def observed(source: Path, target: Path) -> None:
        seen.append(Path(target).suffix)
        rename(source, target)

    (tmp_path / "output").mkdir()
    monkeypatch.setattr(os, "rename", observed)
    assert run(tmp_path / "output") == 0 and seen == [".safetensors", ".json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_ctrl_c_leaves_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "rename", interrupted)
    assert command[1](tmp_path / "output") == 130
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_links_to_nothing(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert command[1](tmp_path / "link") == 1
    assert "is a link to nothing" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


def test_an_output_that_links_to_an_empty_folder(command: Command, tmp_path: Path) -> None:
    name, run = command
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert run(tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and {file.name for file in (tmp_path / "there").iterdir()} == FILES[name]


# --- there and back


def there_and_back(base: Path, tmp_path: Path, config: dict[str, Any], tensors: authors.Tensors) -> Path:
    folders = [str(tmp_path / name) for name in ("published", "adapter", "back")]
    authors.write(Path(folders[0]), config, tensors)
    assert run_import([folders[0], "--base", str(base), "--output", folders[1]]) == 0
    assert run_export([folders[1], "--base", str(base), "--output", folders[2]]) == 0
    return Path(folders[2])


@pytest.mark.parametrize("alpha", [12, 10.5])
def test_types_and_numbers_come_back(bases: dict[str, Path], tmp_path: Path, alpha: float) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    config["shared_routing_adapter_args"]["lora_alpha"] = alpha
    back = there_and_back(bases["olmoe"], tmp_path, config, tensors)
    exported = load_file(back / "model.safetensors")
    assert {name: each.dtype for name, each in exported.items()} == {name: each.dtype for name, each in tensors.items()}
    said = json.loads((back / "config.json").read_text())["shared_routing_adapter_args"]
    assert said == config["shared_routing_adapter_args"] and type(said["lora_alpha"]) is type(alpha)


def test_a_router_that_bfloat16_cannot_hold_stays_in_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = made("olmoe", "R", "LoRA")
    name = "model.layers.1.mlp.shared_routing_adapter_gate.weight"
    tensors[name] = torch.full((4, 64), 0.1)
    exported = load_file(there_and_back(bases["olmoe"], tmp_path, config, tensors) / "model.safetensors")
    assert torch.equal(exported[name], tensors[name])


def test_a_base_in_bfloat16_rounds_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    described = json.loads((bases["olmoe"] / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"dtype": "bfloat16"}))
    weights = load_file(bases["olmoe"] / "model.safetensors")
    halves = {name: each.bfloat16() for name, each in weights.items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    config, tensors = made("olmoe", "S", "LoRA")
    exported = load_file(there_and_back(base, tmp_path, config, tensors) / "model.safetensors")
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


# --- a base that cannot be read


def test_an_export_for_a_base_that_cannot_be_read(
    bases: dict[str, Path], tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    described = json.loads((bases["olmoe"] / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"hidden_size": "64"}))
    assert run_export([str(adapter), "--base", str(base), "--output", str(tmp_path / "output")]) == 1
    said = capsys.readouterr().err
    assert "hidden_size" in said and "Traceback" not in said and not (tmp_path / "output").exists()


def test_base_slot_is_not_exported_for_a_base_that_divides(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there_and_back(bases["olmoe"], tmp_path, *made("olmoe", "R", "LoRA"))
    base = tmp_path / "base"
    base.mkdir()
    described = json.loads((bases["olmoe"] / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"norm_topk_prob": True}))
    assert run_export([str(tmp_path / "adapter"), "--base", str(base), "--output", str(tmp_path / "output")]) == 1
    assert "divides its weights by their sum" in capsys.readouterr().err and not (tmp_path / "output").exists()
