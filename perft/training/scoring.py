"""Owns how good a model is on held-out examples: loss, and how many answers greedy decoding would give exactly.

Greedy decoding gives an answer exactly if every token of it is the likeliest one after those before it: one forward
pass over prompt and answer tells, nothing is generated.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from perft.training.encoding import IGNORED, Encoded
from perft.training.order import collated


class Score(NamedTuple):
    """loss: mean cross-entropy of the learned tokens. right: examples whose answer is given exactly, of `examples`."""

    loss: float
    right: int
    examples: int

    @property
    def accuracy(self) -> float:
        return self.right / self.examples


def next_tokens(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, P, V] at the P positions that predict a token which any row learns, and those tokens [rows, P]."""
    labels = batch["labels"]
    positions_P = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=positions_P,
        use_cache=False,
    )
    return output.logits, labels[:, positions_P + 1]


def mean_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def score(model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad: int, device: torch.device) -> Score:
    """Of a model in evaluation mode, whose mode is put back."""
    was_training = model.training
    model.eval()
    loss, tokens, right = 0.0, 0, 0
    for batch in _batches(examples, batch_size, pad):
        logits, labels = next_tokens(model, {name: tensor.to(device) for name, tensor in batch.items()})
        is_learned = labels != IGNORED
        loss += float(mean_loss(logits, labels, "sum"))
        tokens += int(is_learned.sum())
        right += int(((logits.argmax(dim=-1) == labels) | ~is_learned).all(dim=1).sum())
    model.train(was_training)
    return Score(loss / max(tokens, 1), right, len(examples))


def _batches(examples: Sequence[Encoded], batch_size: int, pad: int) -> Iterator[dict[str, torch.Tensor]]:
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), batch_size):
        yield collated(ordered[start : start + batch_size], pad)
