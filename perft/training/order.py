"""Owns in which order the examples come up: decided before the first step, so that a resumed training goes on in it."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from perft.training.encoding import IGNORED, Encoded

WINDOW = 8
"""Examples are sorted by length within so many batches: little of a batch is padding, and the order stays mixed."""


class OrderedExamples:
    """The examples of a whole training as one dataset, batch after batch."""

    def __init__(self, examples: Sequence[Encoded], batch: int, steps: int, seed: int) -> None:
        self._examples = examples
        self._order = drawn([len(example.ids) for example in examples], batch, steps, seed)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Encoded:
        return self._examples[self._order[place]]


def drawn(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """The number of each example of `steps` batches: every one comes up equally often, give or take once."""
    chance, wanted = random.Random(seed), steps * batch
    order: list[int] = []
    while len(order) < wanted:
        order += chance.sample(range(len(lengths)), len(lengths))
    del order[wanted:]
    mixed: list[int] = []
    for start in range(0, wanted, WINDOW * batch):
        window = sorted(order[start : start + WINDOW * batch], key=lambda number: lengths[number])
        batches = [window[at : at + batch] for at in range(0, len(window), batch)]
        for one in chance.sample(batches, len(batches)):
            mixed += one
    return mixed


def collated(examples: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """input_ids, attention_mask and labels [rows, longest], padded on the right."""
    longest = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([example.ids for example in examples], pad),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
