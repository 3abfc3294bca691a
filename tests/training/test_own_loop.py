"""The Python way: any loop, transformers' Trainer and its own checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from perft.checkpoint import checkpoint_fingerprint
from perft.hf import TrainableAdapter, attach, load, read_config, save
from tests import tiny
from tests.training import tiny_base

CASES = [("R", "lora", {}), ("E", "parallel", {})]


class Sums(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few sums as tokens, all of the same length."""

    def __init__(self) -> None:
        tokenizer = tiny_base.tokenizer()
        self.rows = [torch.tensor(tokenizer.encode(f"{a}+{b}={(a + b) % 10}")) for a in range(10) for b in range(4)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = self.rows[number]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainee(base: Path, case: tuple[str, str, dict[str, Any]]) -> TrainableAdapter:
    torch.manual_seed(0)
    model: Any = tiny.load(base)
    variant, expert_type, changes = case
    return TrainableAdapter(model, attach(model, tiny.adapter_config(model, variant, expert_type, **changes), 0.05))


def trainer(model: TrainableAdapter, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, save_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, seed=0,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Sums())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_trainers_checkpoint_holds_the_adapter_alone_and_goes_on(
    olmoe: Path, tmp_path: Path, case: tuple[str, str, dict[str, Any]]
) -> None:
    whole = trainer(trainee(olmoe, case), tmp_path / "a")
    whole.train()
    weights = (tmp_path / "a" / "checkpoint-4" / "model.safetensors").stat().st_size
    assert weights < 1.2 * sum(4 * p.numel() for p in whole.model.parameters()) + 10_000
    resumed = trainer(trainee(olmoe, case), tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    before, after = whole.model.state_dict(), resumed.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_saved_and_loaded(olmoe: Path, tmp_path: Path) -> None:
    model: Any = tiny.load(olmoe)
    config = tiny.adapter_config(model, "R", "lora")
    adapter = tiny.randomize(attach(model, config), seed=1)
    save(adapter, tmp_path / "a")
    expected = model(torch.arange(3, 30).unsqueeze(0)).logits
    adapter.detach_from_model()
    again = attach(model, config)
    load(again, tmp_path / "a")
    assert torch.equal(model(torch.arange(3, 30).unsqueeze(0)).logits, expected)
    again.detach_from_model()
    other = attach(model, tiny.adapter_config(model, "R", "lora", bottleneck=6))
    with pytest.raises(ValueError, match="an adapter of another configuration"):
        load(other, tmp_path / "a")


def test_a_save_that_fails_leaves_no_half_adapter(olmoe: Path, tmp_path: Path) -> None:
    model: Any = tiny.load(olmoe)
    adapter = attach(model, tiny.adapter_config(model, "S", "lora"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_model.safetensors").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        save(adapter, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter_model.safetensors"]


def test_a_folder_that_was_saved_says_which_base_and_how_to_attach_it(olmoe: Path, tmp_path: Path) -> None:
    model: Any = tiny.load(olmoe)
    adapter = tiny.attach_random(model, CASES[0], seed=1)
    adapter.detach_from_model()
    save(adapter, str(tmp_path / "a"))
    config = read_config(str(tmp_path / "a"))
    assert config.base_fingerprint == checkpoint_fingerprint(olmoe) is not None
    again = attach(model, config)
    load(again, str(tmp_path / "a"))
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in adapter.tensors().items())
    again.detach_from_model()
    other = attach(model, tiny.adapter_config(model, "R", "lora", bottleneck=3))
    with pytest.raises(ValueError, match=r"another configuration: bottleneck: found 5, expected 3$"):
        load(other, tmp_path / "a")
