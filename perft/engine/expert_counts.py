"""Owns the count of tokens per PEFT expert, which shows how evenly adapters use their experts.

Every n-th step is counted, over all layers. Invariant: only variants that choose experts per token (R, E) are
counted; D and S use all of theirs for every token.
"""

import torch

from perft.operator.base import Watch


class ExpertCounts:
    """Counts by adapter id, kept on the device until `read`. every: count each `every`-th step (0: none)."""

    def __init__(self, every: int) -> None:
        self._every, self._steps = every, 0
        self._counts: dict[int, torch.Tensor] = {}

    def watch(self) -> Watch | None:
        """The callback that receives the next step's expert weights; None if the step is not counted."""
        self._steps += 1
        return self._count if self._every and self._steps % self._every == 0 else None

    def read(self) -> dict[int, list[int]]:
        """Tokens per expert so far, by adapter id. Waits for the device."""
        return {number: counts.tolist() for number, counts in self._counts.items()}

    def forget(self, adapter_id: int) -> None:
        """Remove an adapter's counts."""
        self._counts.pop(adapter_id, None)

    def _count(self, adapter_id: int, weights_nM: torch.Tensor) -> None:
        """weights_nM: weight of every expert for n tokens, 0 where not selected."""
        used_M = (weights_nM != 0).sum(dim=0)
        known = self._counts.get(adapter_id)
        self._counts[adapter_id] = used_M if known is None else known + used_M
