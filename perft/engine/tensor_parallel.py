"""Owns which tokens' delta a tensor-parallel rank computes.

The delta is added before the layer's output is summed over ranks, so each token's is added by one rank only.
Invariant: every token belongs to exactly one rank, or, where the output is whole on every rank already, to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from perft.operator.base import TILE_TOKENS


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `size` that share the work out (size 1: every rank does all of it).

    counts: whether this rank counts the tokens it works on; over all ranks each is counted once.
    """

    rank: int
    size: int
    counts: bool = True

    @classmethod
    def of(cls, runners: Sequence[MoERunner]) -> "Share":
        """This rank's share. Raises ValueError if some layers are reduced after their experts and others are not."""
        sizes = {1 if runner._fused_output_is_reduced else runner.moe_config.tp_size for runner in runners}
        if len(sizes) != 1:
            raise ValueError("some MoE layers sum their experts' output over ranks by themselves and others do not")
        size = sizes.pop()
        rank = get_tensor_model_parallel_rank()
        return cls(rank, size, counts=size > 1 or rank == 0)

    def of_tokens(self, tokens_n: np.ndarray, tile: int) -> np.ndarray:
        """This rank's of one adapter's tokens, every `size`-th tile. tile: how many tiles of the step come before."""
        if self.size == 1:
            return tokens_n
        turn_n = (tile + np.arange(len(tokens_n)) // TILE_TOKENS) % self.size
        own_n: np.ndarray = tokens_n[turn_n == self.rank]
        return own_n
