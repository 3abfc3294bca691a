"""The CPU back end: a compiled kernel that reads the rows which are used, where they lie, and allocates nothing.

Threads, where they help (`thread_choice`), are the OpenMP threads that torch has already.
"""

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite.binding import ffi

from perft.operator.base import TILE_TOKENS, Batch, Delta, Watch
from perft.operator.cpu.kernel_cache import kernels_kept
from perft.operator.cpu.thread_choice import ThreadChoice
from perft.operator.tables import SlotTables
from perft.routing import BaseRouter, top_probabilities

with kernels_kept():
    from perft.operator.cpu.kernels import ADD_DELTA, Plan

# vLLM's start looks at vars() of every object in every module. llvmlite's library answers any name, `__dict__` too,
# with a function, on which that fails: the second engine of a process would not start.
ffi.lib._fntab["__dict__"] = {}

logger = logging.getLogger(__name__)

NUMBERS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.float16: "int16"}
"""What a dtype's numbers are to the kernel."""

THREADING = ["omp", "workqueue", "tbb"]
"""Numba's threading layers, the first that loads: OpenMP is torch's own, whose threads wait for work already."""


class NumbaOperator:
    """See `perft.operator.base.Operator`. pool_RD: the row pool; tables: its tables. Both on the CPU."""

    max_columns: int | None = None
    max_routed_experts: int | None = None

    def __init__(self, pool_RD: torch.Tensor, tables: SlotTables) -> None:
        self.pool_RD, self.tables = pool_RD, tables
        self.alone, self.together = (ADD_DELTA[NUMBERS[pool_RD.dtype], together] for together in (False, True))
        self._step: NumbaStep | None = None
        self.thread_choice = ThreadChoice()
        self._scratch = Scratch(1, 1, 1)
        if "NUMBA_THREADING_LAYER" not in os.environ and "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
            numba.config.THREADING_LAYER_PRIORITY = THREADING

    def warm_up(self) -> None:
        """Compile the kernels for the pool's dtype, or load them, and say so in the log."""
        started = time.monotonic()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        row_D = torch.zeros(1, self.pool_RD.shape[1], dtype=self.pool_RD.dtype)
        for kernel in (self.alone, self.together):
            NumbaStep(self, Batch(torch.empty(0, dtype=torch.int64), [], 1), kernel).add(0, row_D, None, row_D)
        seconds, stats = time.monotonic() - started, self.together.stats
        done = "compiled and kept in" if stats.cache_misses else "loaded from"
        logger.info("PERFT: CPU kernels (Numba) %s %s in %.1f s", done, stats.cache_path, seconds)

    def plan(self, batch: Batch) -> "NumbaStep":
        if self._step is not None:
            self._step.report(self.thread_choice)
        self._step = NumbaStep(self, batch)
        return self._step

    def scratch(self, tokens: int, top_k: int, width: int) -> "Scratch":
        """Memory for one layer, kept for the next."""
        if not self._scratch.holds(tokens, top_k, width):
            self._scratch = Scratch(tokens, top_k, width)
        return self._scratch


class Scratch:
    """chosen_nK, weight_nK: the experts of each token and their weights. a_nW: their gated activations."""

    def __init__(self, tokens: int, top_k: int, width: int) -> None:
        self.chosen_nK = torch.empty(tokens, top_k, dtype=torch.int32)
        self.weight_nK = torch.empty(tokens, top_k)
        self.a_nW = torch.empty(tokens, width)

    def holds(self, tokens: int, top_k: int, width: int) -> bool:
        """Whether there is room."""
        return len(self.a_nW) >= tokens and self.a_nW.shape[1] >= width and self.chosen_nK.shape[1] >= top_k


class NumbaStep:
    """See `perft.operator.base.Step`."""

    def __init__(self, operator: NumbaOperator, batch: Batch, kernel: Any = None) -> None:
        self._operator, self._batch, self._kernel = operator, batch, kernel
        self._layers = batch.layers
        configs = [group.adapter.config for group in batch.groups]
        self._is_embedded = any(config.variant == "E" for config in configs)
        self._slots = max((c.top_k or 0 for c in configs if c.gate_weight == "base_slot"), default=0)
        self._embedded_size = max((c.bottleneck for c in configs if c.variant == "E"), default=0)
        own = [(config.top_k or config.num_experts, config.bottleneck) for config in configs if config.variant != "E"]
        self._own_top_k = max((top_k for top_k, _ in own), default=1)
        self._own_width = max((top_k * bottleneck for top_k, bottleneck in own), default=1)
        self._tokens_n = batch.tokens_n
        self._tiles_L3 = torch.tensor(list(_tiles(batch)), dtype=torch.int32).view(-1, 3)
        self._plan: np.ndarray | None = None
        self._plan_address = 0
        self._work = 0
        self._together = False
        self._layers_done, self._seconds = 0, 0.0

    def start(self, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> Delta | None:
        """See `Step`. All of the work is done by the `Delta`, in one go."""
        return partial(self.add, layer, x_TD, base) if layer in self._layers else None

    def add(self, layer: int, x_TD: torch.Tensor, base: BaseRouter | None, output_TD: torch.Tensor) -> None:
        """Add the layer's delta to `output_TD`."""
        weight, chosen, slots, base_top_k = 0, 0, 0, 1
        if self._is_embedded and base is not None:
            weights_TJ, chosen_TJ = base.top()
            weights_TJ, chosen_TJ = weights_TJ.float().contiguous(), chosen_TJ.to(torch.int32).contiguous()
            weight, chosen, base_top_k = weights_TJ.data_ptr(), chosen_TJ.data_ptr(), chosen_TJ.shape[1]
        if self._slots and base is not None:
            slots_TK = top_probabilities(base.logits(), self._slots)
            slots = slots_TK.data_ptr()
        if self._plan is None:
            self._plan = self._describe(base_top_k)
            self._plan_address = self._plan.ctypes.data
            self._together = self._work > 0 and self._operator.thread_choice.together(self._work)
            if self._kernel is None:
                self._kernel = self._operator.together if self._together else self._operator.alone
        pool_RD, size = self._operator.pool_RD, self._batch.size
        if x_TD.dtype is not pool_RD.dtype or output_TD.dtype is not pool_RD.dtype or len(x_TD) < size:
            raise ValueError(  # the kernel trusts addresses
                f"found {len(x_TD)} tokens of {x_TD.dtype}, expected {size} of {pool_RD.dtype} at layer {layer}"
            )
        if not x_TD.is_contiguous():
            x_TD = x_TD.contiguous()
        contiguous_TD = output_TD if output_TD.is_contiguous() else output_TD.contiguous()
        started = time.perf_counter()
        self._kernel(self._plan_address, layer, x_TD.data_ptr(), weight, chosen, slots, contiguous_TD.data_ptr())
        self._seconds += time.perf_counter() - started
        self._layers_done += 1
        if contiguous_TD is not output_TD:
            output_TD.copy_(contiguous_TD)
        if self._batch.watch is not None:
            self._show(self._batch.watch, layer, base_top_k)

    def report(self, choice: ThreadChoice) -> None:
        """Tell how long a layer of this step took."""
        if self._work and self._layers_done:
            choice.took(self._work, self._together, self._seconds / self._layers_done)

    def _describe(self, base_top_k: int) -> np.ndarray:
        """The plan's array. base_top_k: known only once a layer has run."""
        operator, tokens = self._operator, len(self._tokens_n)
        width = max(self._own_width, base_top_k * self._embedded_size)
        scratch = self._scratch = operator.scratch(tokens, max(base_top_k, self._own_top_k), width)
        self._work = 2 * tokens * width * operator.pool_RD.shape[1] if len(self._tiles_L3) > 1 else 0
        tables = operator.tables
        plan = np.zeros(len(Plan), np.int64)
        for entry, value in (
            (Plan.TILES, self._tiles_L3.data_ptr()),
            (Plan.TILE_COUNT, len(self._tiles_L3)),
            (Plan.TOKENS, self._tokens_n.data_ptr()),
            (Plan.TOKEN_COUNT, tokens),
            (Plan.PAGE_INDEX, tables.page_index.data_ptr()),
            (Plan.LAYER_OFFSET, tables.layer_offset.data_ptr()),
            (Plan.META, tables.meta.data_ptr()),
            (Plan.ENTRIES, len(tables.page_index)),
            (Plan.LAYERS, tables.layer_offset.shape[0]),
            (Plan.SLOTS, tables.layer_offset.shape[1]),
            (Plan.POOL, operator.pool_RD.data_ptr()),
            (Plan.ROWS, operator.pool_RD.shape[0]),
            (Plan.WIDTH, operator.pool_RD.shape[1]),
            (Plan.STEP_TOKENS, self._batch.size),
            (Plan.CHOSEN, scratch.chosen_nK.data_ptr()),
            (Plan.WEIGHT, scratch.weight_nK.data_ptr()),
            (Plan.TOP_K, scratch.chosen_nK.shape[1]),
            (Plan.ACTIVATIONS, scratch.a_nW.data_ptr()),
            (Plan.ACTIVATION_WIDTH, scratch.a_nW.shape[1]),
            (Plan.BASE_TOP_K, base_top_k),
            (Plan.BASE_SLOTS, max(1, self._slots)),
        ):
            plan[entry] = value
        return plan

    def _show(self, watch: Watch, layer: int, base_top_k: int) -> None:
        """Show the weights of the layer's experts to who watches."""
        for group in self._batch.groups:
            config = group.adapter.config
            if layer not in group.adapter.layers or config.variant in ("D", "S"):
                continue
            used = slice(0, config.top_k or base_top_k)
            chosen = self._scratch.chosen_nK[group.start : group.stop, used].long()
            weights = self._scratch.weight_nK[group.start : group.stop, used]
            by_expert = torch.zeros(len(chosen), config.num_experts + 1)
            by_expert.scatter_(1, torch.where(chosen < 0, config.num_experts, chosen), weights)
            watch(group.id, by_expert[:, :-1])


def _tiles(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Slot, start and length of every tile."""
    for group in batch.groups:
        edges = [*range(group.start, group.stop, TILE_TOKENS), group.stop]
        for start, stop in pairwise(edges):
            yield group.adapter.slot, start, stop - start


def make_numba_operator(pool_RD: torch.Tensor, tables: SlotTables) -> NumbaOperator:
    """The back end, with its kernel compiled."""
    operator = NumbaOperator(pool_RD, tables)
    operator.warm_up()
    return operator
