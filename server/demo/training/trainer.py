"""Owns how a demo adapter is trained: AdamW, warm-up, then linear decay, cross-entropy on the answers' tokens only.

Small on purpose: one process, float32, on the CPU. T: the tokens of a batch that belong to an answer.
"""

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from perft.hf import PerftAdapter
from server.demo.training.chat import Encoded

# Examples are sorted by length within a window of this many batches, so that little of a batch is padding.
WINDOW = 8
REPORT_EVERY = 20


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; one seed decides the order of the examples."""

    steps: int
    batch_size: int
    learning_rate: float
    warm_up: int = 10
    seed: int = 42

    def rate_at(self, step: int) -> float:
        """The factor of the learning rate at `step`, counted from 0."""
        return min((step + 1) / self.warm_up, (self.steps - step) / max(self.steps - self.warm_up, 1), 1.0)


def train(model: Any, adapter: PerftAdapter, examples: list[Encoded], pad: int, schedule: Schedule) -> float:
    """Train `adapter`, which is attached to `model`; returns the mean loss of the last REPORT_EVERY steps."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_at)
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(batches(examples, schedule), start=1):
        loss = answer_loss(model, batch, pad)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0 or step == schedule.steps:
            report(step, schedule.steps, losses, time.monotonic() - started)
    return mean_of_last(losses)


def batches(examples: list[Encoded], schedule: Schedule) -> list[list[Encoded]]:
    """The batches of a whole training: each example comes up equally often, give or take once."""
    order = random.Random(schedule.seed)
    wanted = schedule.steps * schedule.batch_size
    drawn: list[Encoded] = []
    while len(drawn) < wanted:
        drawn += order.sample(examples, len(examples))
    drawn = drawn[:wanted]
    cut: list[list[Encoded]] = []
    for start in range(0, wanted, WINDOW * schedule.batch_size):
        window = sorted(drawn[start : start + WINDOW * schedule.batch_size], key=lambda example: len(example.ids))
        parts = [window[at : at + schedule.batch_size] for at in range(0, len(window), schedule.batch_size)]
        cut += order.sample(parts, len(parts))
    return cut


def answer_loss(model: Any, batch: list[Encoded], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens. Only their positions go through the output layer."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (longest - len(example.ids)) for example in batch])
    position = torch.arange(longest)
    lengths = torch.tensor([len(example.ids) for example in batch]).unsqueeze(1)
    starts = torch.tensor([example.answer_start for example in batch]).unsqueeze(1)
    is_answer = (position >= starts) & (position < lengths)
    hidden = model.model(input_ids=ids, attention_mask=(position < lengths).long()).last_hidden_state
    # The hidden state at one position predicts the token of the next.
    predicts_TD = hidden[:, :-1][is_answer[:, 1:]]
    return F.cross_entropy(model.lm_head(predicts_TD), ids[is_answer])


def report(step: int, steps: int, losses: list[float], seconds: float) -> None:
    left = seconds / step * (steps - step)
    print(f"  step {step}/{steps}: loss {mean_of_last(losses):.3f}, {seconds:.0f} s, {left:.0f} s left", flush=True)


def mean_of_last(losses: list[float]) -> float:
    recent = losses[-REPORT_EVERY:]
    return sum(recent) / len(recent)
