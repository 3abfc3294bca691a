"""Owns how evenly adapters use their experts: tokens per PEFT expert, counted in every n-th step, over all layers.

Only variants that weigh experts per token (R, E) are counted: D and S use all of theirs on every token.
"""

import torch

from perft.operator.base import Watch


class ExpertCounts:
    """Counts by adapter id, on the device until somebody reads them."""

    def __init__(self, every: int) -> None:
        self._every, self._steps = every, 0
        self._counts: dict[int, torch.Tensor] = {}

    def watch(self) -> Watch | None:
        """What the next step shows its weights to; None for a step that is not counted."""
        self._steps += 1
        return self._count if self._every and self._steps % self._every == 0 else None

    def read(self) -> dict[int, list[int]]:
        """Tokens of every expert so far, by adapter id."""
        return {number: counts.tolist() for number, counts in self._counts.items()}

    def forget(self, adapter_id: int) -> None:
        self._counts.pop(adapter_id, None)

    def _count(self, adapter_id: int, weights_nM: torch.Tensor) -> None:
        used_M = (weights_nM != 0).sum(dim=0)
        known = self._counts.get(adapter_id)
        self._counts[adapter_id] = used_M if known is None else known + used_M
