"""Owns the Trainer: transformers' own, with the paper's loss, our held-out score, and a progress bar that says little.

transformers' Trainer and not TRL's SFTTrainer: what SFT adds (data formats, masks, packing) is in encoding.py already,
without one more package, and a Trainer's checkpoints, resuming and `accelerate launch` come with it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from perft.hf import PerftAdapter
from perft.training.encoding import Encoded
from perft.training.load_balance import BaseRouters, router_losses
from perft.training.scoring import Score, mean_loss, next_tokens, score


class AdapterTrainer(Trainer):
    """Trains a `TrainableAdapter`, or a PEFT model, on `OrderedExamples`.

    loss = cross-entropy + `aux_loss` * (load balance of the base's routers + of the adapter's own).
    """

    loss_is_scaled_for_ga = False  # a batch's loss is a mean: Trainer divides by the accumulated batches

    def __init__(
        self, *arguments: Any, aux_loss: float, base_routers: BaseRouters | None, adapter: PerftAdapter | None,
        held_out: Sequence[Encoded], pad: int, **named: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **named)
        self.aux_loss, self.base_routers, self.adapter = aux_loss, base_routers, adapter
        self.held_out, self.pad = held_out, pad
        self._started: float | None = None
        self._seconds_before = 0.0
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(self.begin))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Only positions that predict a learned token go through the output layer."""
        logits, labels = next_tokens(model, inputs)
        loss = mean_loss(logits, labels)
        if self.aux_loss:
            mask_T = inputs["attention_mask"].flatten()
            loss = loss + self.aux_loss * router_losses(self.base_routers, self.adapter, mask_T)
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and accuracy on the held-out examples."""
        found = self.score()
        metrics = {f"{metric_key_prefix}_loss": found.loss, f"{metric_key_prefix}_accuracy": found.accuracy}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What is kept in a checkpoint's history says how long the training took so far."""
        super().log(logs | {"seconds": round(self.seconds(), 1)}, start_time)

    def begin(self) -> None:
        """The clock starts; a training that goes on counts from what its history says."""
        self._started = time.monotonic()
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in self.state.log_history), default=0.0)

    def seconds(self) -> float:
        """How long the training took, those parts too that were killed."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def score(self) -> Score:
        """Of the model as it is now."""
        model: Any = self.model
        return score(model, self.held_out, self.args.per_device_eval_batch_size, self.pad, self.args.device)


class Progress(TrainerCallback):
    """A bar with the loss, and a line for each look at the held-out part. Off a terminal: a line for each log."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._bar: Any = None
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._begin()
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, file=sys.stderr,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        if self._bar is None or logs is None:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            tqdm.write(
                f"{step}: held-out loss {logs['eval_loss']:.4f}, answers right {logs['eval_accuracy']:.1%}",
                file=sys.stderr,
            )
        elif "loss" in logs and self._bar.disable:
            print(f"{step}: loss {logs['loss']:.4f}", file=sys.stderr, flush=True)
        elif "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def is_finite(model: nn.Module) -> bool:
    """Whether every parameter that was trained is finite."""
    return all(bool(torch.isfinite(each).all()) for each in model.parameters() if each.requires_grad)
