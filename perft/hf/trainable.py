"""Owns a model with its adapter as one module for a Trainer: its parameters and its state are the adapter's alone.

    trainer = Trainer(TrainableAdapter(model, adapter), TrainingArguments(...), train_dataset=...)

A checkpoint of the Trainer then holds the adapter and not the base, and resuming from one restores it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from perft.hf.adapter import PerftAdapter


class TrainableAdapter(nn.Module):
    """`adapter` is the only submodule; `base` runs, and is moved and switched along with it."""

    def __init__(self, base: nn.Module, adapter: PerftAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        object.__setattr__(self, "base", base)  # no submodule: neither its parameters nor its state are the Trainer's
        self.base: Any

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
        **named: Any,
    ) -> Any:  # fmt: skip
        """The base's own output, with the adapter's delta in it; with labels also its loss. A Trainer passes on the
        columns of its data that are named here."""
        return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **named)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.adapter.state_dict(*arguments, **named)

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **named: Any) -> Any:
        return self.adapter.load_state_dict(state_dict, *arguments, **named)

    def train(self, mode: bool = True) -> "TrainableAdapter":
        self.base.train(mode)
        return super().train(mode)

    def _apply(self, function: Any, recurse: bool = True) -> "TrainableAdapter":
        self.base._apply(function, recurse)
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        return next(self.adapter.parameters()).device

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **named: Any
    ) -> None:
        """Of the base. Without re-entrant checkpoints: its inputs need no gradient, the adapter inside does."""
        how = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        self.base.gradient_checkpointing_enable(how, **named)

    def gradient_checkpointing_disable(self) -> None:
        self.base.gradient_checkpointing_disable()
