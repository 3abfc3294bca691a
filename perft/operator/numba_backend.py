"""The CPU back end: compiled kernels that read the rows which are used, where they lie, and allocate nothing.

Decode waits for memory, not for arithmetic, and the base's own threads wait at the end of each of its operations. So
a small layer is worked on by the calling thread alone, and a large one by the OpenMP threads that torch has already.
"""

import logging
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite.binding import ffi

from perft.operator.base import Batch, Delta
from perft.operator.kernel_cache import kernels_kept
from perft.operator.tables import SlotTables
from perft.routing import BaseRouter, top_probabilities

with kernels_kept():
    from perft.operator import numba_kernels as kernels

# vLLM's start looks at vars() of every object in every module. llvmlite's library answers any name, `__dict__` too,
# with a function, on which that fails: the second engine of a process would not start.
ffi.lib._fntab["__dict__"] = {}

logger = logging.getLogger(__name__)

TILE_TOKENS = 16
"""Tokens of one tile: all of one adapter, worked on together by one thread."""
PARALLEL_PRODUCTS = 2_000_000
"""Multiplications of one layer above which its tiles are shared out over threads."""

INTEGERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""The integers that stand for half-precision numbers (perft.operator.numba_kernels)."""


THREADING = ["omp", "workqueue", "tbb"]
"""Numba's threading layers, the first that loads: OpenMP is torch's own, whose threads wait for work already."""


class NumbaOperator:
    """See `perft.operator.base.Operator`. pool_RD: the row pool; tables: its tables. Both on the CPU."""

    def __init__(self, pool_RD: torch.Tensor, tables: SlotTables) -> None:
        self.pool_RD = as_array(pool_RD)
        self.tables = (tables.page_index.numpy(), tables.layer_offset.numpy(), tables.meta.numpy())
        self.threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        self._scratch = Scratch(1, 1, 1)
        if "NUMBA_THREADING_LAYER" not in os.environ and "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
            numba.config.THREADING_LAYER_PRIORITY = THREADING

    def warm_up(self) -> None:
        """Compile the kernels for the pool's dtype, or load them, and say so in the log."""
        started = time.monotonic()
        pool_RD, tables = self.pool_RD, self.tables
        no_tile_L3, perm_n = np.zeros((0, 3), np.int32), np.zeros(0, np.int64)
        x_TD, scratch = np.zeros((1, pool_RD.shape[1]), pool_RD.dtype), Scratch(1, 1, 1)
        kernels.shrink(
            0, no_tile_L3, perm_n, *tables, pool_RD, x_TD, NO_WEIGHTS, NO_EXPERTS, NO_WEIGHTS, scratch.chosen_nK,
            scratch.weight_nK, scratch.a_nW,
        )  # fmt: skip
        kernels.expand(0, no_tile_L3, perm_n, *tables, pool_RD, 1, scratch.chosen_nK, scratch.a_nW, x_TD)
        seconds, is_new = time.monotonic() - started, bool(kernels.shrink.stats.cache_misses)
        logger.info(
            "PERFT: CPU kernels (Numba) %s %s in %.1f s",
            "compiled and kept in" if is_new else "loaded from", kernels.shrink.stats.cache_path, seconds,
        )  # fmt: skip

    def plan(self, batch: Batch) -> "NumbaStep":
        return NumbaStep(self, batch)

    def scratch(self, tokens: int, top_k: int, width: int) -> "Scratch":
        """Memory for one layer, kept for the next."""
        if not self._scratch.holds(tokens, top_k, width):
            self._scratch = Scratch(tokens, top_k, width)
        return self._scratch


class Scratch:
    """chosen_nK, weight_nK: the experts of each token and their weights. a_nW: their gated activations."""

    def __init__(self, tokens: int, top_k: int, width: int) -> None:
        self.chosen_nK = np.empty((tokens, top_k), np.int32)
        self.weight_nK = np.empty((tokens, top_k), np.float32)
        self.a_nW = np.empty((tokens, width), np.float32)

    def holds(self, tokens: int, top_k: int, width: int) -> bool:
        return self.a_nW.shape[0] >= tokens and self.a_nW.shape[1] >= width and self.chosen_nK.shape[1] >= top_k


NO_WEIGHTS, NO_EXPERTS = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32)


class NumbaStep:
    """See `perft.operator.base.Step`."""

    def __init__(self, operator: NumbaOperator, batch: Batch) -> None:
        self._operator, self._batch = operator, batch
        self._layers = batch.layers
        configs = {group.adapter.config for group in batch.groups}
        self._is_embedded = any(config.variant == "E" for config in configs)
        self._slots = max((c.top_k or 0 for c in configs if c.gate_weight == "base_slot"), default=0)
        self._embedded_size = max((c.bottleneck for c in configs if c.variant == "E"), default=0)
        own = [(config.top_k or config.num_experts, config.bottleneck) for config in configs if config.variant != "E"]
        self._own_top_k = max((top_k for top_k, _ in own), default=1)
        self._own_width = max((top_k * bottleneck for top_k, bottleneck in own), default=1)
        self._perm_n = batch.tokens_n.numpy()
        self._tiles_L3 = np.array(list(_tiles(batch)), dtype=np.int32).reshape(-1, 3)

    def start(self, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> Delta | None:
        if layer not in self._layers:
            return None
        operator, tokens = self._operator, self._perm_n.shape[0]
        base_weight_TJ, base_chosen_TJ = NO_WEIGHTS, NO_EXPERTS
        if self._is_embedded:
            weights, chosen = base.top()
            base_weight_TJ, base_chosen_TJ = as_array(weights.float()), as_array(chosen.to(torch.int32))
        top_k = base_chosen_TJ.shape[1]
        slots_TK = NO_WEIGHTS
        if self._slots:
            slots_TK = as_array(top_probabilities(base.logits(), self._slots))
        width = max(self._own_width, top_k * self._embedded_size)
        scratch = operator.scratch(tokens, max(top_k, self._own_top_k), width)
        work = tokens * width * x_TD.shape[1]
        threads = operator.threads if len(self._tiles_L3) > 1 and work >= PARALLEL_PRODUCTS else 1
        numba.set_num_threads(threads)
        kernels.shrink(
            layer, self._tiles_L3, self._perm_n, *operator.tables, operator.pool_RD, as_array(x_TD), base_weight_TJ,
            base_chosen_TJ, slots_TK, scratch.chosen_nK, scratch.weight_nK, scratch.a_nW,
        )  # fmt: skip
        self._watch(layer, scratch, top_k)

        def add(output_TD: torch.Tensor) -> None:
            numba.set_num_threads(threads)
            contiguous_TD = output_TD.contiguous()
            kernels.expand(
                layer, self._tiles_L3, self._perm_n, *operator.tables, operator.pool_RD, top_k, scratch.chosen_nK,
                scratch.a_nW, as_array(contiguous_TD),
            )  # fmt: skip
            if contiguous_TD is not output_TD:
                output_TD.copy_(contiguous_TD)

        return add

    def _watch(self, layer: int, scratch: Scratch, base_top_k: int) -> None:
        """Show the experts' weights to who watches."""
        if self._batch.watch is None:
            return
        for group in self._batch.groups:
            config = group.adapter.config
            if layer not in group.adapter.layers or config.variant in ("D", "S"):
                continue
            used = slice(0, config.top_k or base_top_k)
            chosen = torch.from_numpy(scratch.chosen_nK[group.start : group.stop, used]).long()
            weights = torch.from_numpy(scratch.weight_nK[group.start : group.stop, used])
            by_expert = torch.zeros(len(chosen), config.num_experts + 1)
            by_expert.scatter_(1, torch.where(chosen < 0, config.num_experts, chosen), weights)
            self._batch.watch(group.id, by_expert[:, :-1])


def _tiles(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Slot, start and length of every tile."""
    for group in batch.groups:
        edges = [*range(group.start, group.stop, TILE_TOKENS), group.stop]
        for start, stop in pairwise(edges):
            yield group.adapter.slot, start, stop - start


def as_array(tensor: torch.Tensor) -> Any:
    """A CPU tensor's memory as the kernels read it; a copy of one whose rows do not lie together."""
    integer = INTEGERS.get(tensor.dtype)
    return (tensor if integer is None else tensor.view(integer)).contiguous().numpy()


def make_numba_operator(pool_RD: torch.Tensor, tables: SlotTables) -> NumbaOperator:
    """The back end, with its kernels compiled."""
    operator = NumbaOperator(pool_RD, tables)
    operator.warm_up()
    return operator
