"""The Triton back end, for CUDA devices: three launches a layer, the same ones for every batch of a size.

Everything that a kernel reads lies at a fixed address, and grids depend on the number of tokens of the step alone, so a
captured graph stays right when only the tables change: `plan` writes which tokens belong to which slot, the pool's
tables say what a slot is. Nothing here waits for the device.

Invariant: a step of up to `decode_tokens` tokens has tiles of DECODE.tile tokens, a larger one of PREFILL.tile. Graphs
must be captured up to `decode_tokens` at most, so that a batch and the padded batch it is replayed as agree on it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from perft.config import AdapterConfig
from perft.operator.base import Batch, Delta, Sizes
from perft.operator.gpu import kernels
from perft.operator.tables import SlotTables
from perft.routing import BaseRouter

SMALLEST_BLOCK = 16
"""The smallest side of a block that tensor cores multiply."""
MAX_EXPERTS = 1024
ROUTE_CELLS = 4096
"""Logits that one program of `route` holds at once: tokens x experts."""
SHRINK_PROGRAMS = 1024
"""Programs of `shrink` that fill a device: with few tiles, more of them share one."""
OVERLAPS_FROM = (9, 0)
"""Compute capability from which a launch can begin while the one before it ends."""
STAGING_SLOTS = 4
"""Steps whose tables may be on their way to the device at once."""


@dataclass(frozen=True)
class Tiling:
    """Block sizes for tiles of `tile` tokens: `*_c` columns of M * B, `*_d` columns of D (of two bytes) at a time."""

    tile: int
    route_d: int
    shrink_c: int
    shrink_d: int
    expand_c: int
    expand_d: int
    route_warps: int
    route_stages: int
    shrink_stages: int
    expand_stages: int
    warps: int = 4


# The quickest of some forty variants on an H100, at the shape of OLMoE (docs/measured.md).
DECODE = Tiling(
    tile=16, shrink_c=32, shrink_d=128, expand_c=128, expand_d=128, route_d=128,
    route_warps=4, route_stages=4, shrink_stages=4, expand_stages=2,
)  # fmt: skip
PREFILL = Tiling(
    tile=64, shrink_c=64, shrink_d=64, expand_c=128, expand_d=128, route_d=128,
    route_warps=8, route_stages=3, shrink_stages=6, expand_stages=1,
)  # fmt: skip
FEW_EXPERTS, SOME_EXPERTS = 16, 64
"""Experts of R up to which a router has blocks of its own."""

DECODE_TOKENS = 512
"""The largest step whose tiles are small."""
MAX_COLUMNS, MAX_ROUTED_EXPERTS = 4096, 256
"""The largest M * B of an adapter, and the largest M of one of variant R, that an engine's buffers are made for."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch one kernel on the current stream. Every launch of this back end comes through here."""
    kernel[grid](*arguments, **constants)


class TritonOperator:
    """See `perft.operator.base.Operator`.

    pool_RD, tables: the row pool. max_tokens, max_groups: tokens and adapters of a step. width: the largest M * B of an
    adapter; max_experts: the largest M of an adapter of variant R. base_experts: N. base_top_k: J; 0 if the base does
    not give its top-k: then no adapter of variant E may be planned, as none with `base_slot` without `has_logits`.
    counts: int32 [S, a column for every expert]; each layer of each step adds the tokens of each expert (R and E only).
    """

    def __init__(
        self,
        pool_RD: torch.Tensor,
        tables: SlotTables,
        *,
        max_tokens: int,
        max_groups: int,
        width: int,
        max_experts: int,
        base_experts: int,
        base_top_k: int,
        has_logits: bool = True,
        decode_tokens: int = DECODE_TOKENS,
        counts: torch.Tensor | None = None,
    ) -> None:
        assert pool_RD.is_contiguous() and max(max_experts, base_experts) <= MAX_EXPERTS
        self.pool_RD, self.tables = pool_RD, tables
        self.max_tokens, self.max_groups, self.decode_tokens = max_tokens, max_groups, decode_tokens
        self.max_experts, self.has_logits = max_experts, has_logits
        self.base_experts, self.base_top_k = base_experts, base_top_k
        self.max_columns: int | None = width
        self.max_routed_experts: int | None = max_experts
        self.width = _multiple(width, SMALLEST_BLOCK)
        self.experts = _power_of_two(max(max_experts, base_experts))
        device = pool_RD.device
        tiles = max(self.tiles(min(max_tokens, decode_tokens)), self.tiles(max_tokens))
        self.step_table = StepTable(max_tokens, tiles, device)
        self.weights_PX = torch.empty(max_tokens, self.experts, dtype=torch.float32, device=device)
        self.hits_NX = torch.empty(tiles, self.experts, dtype=torch.int32, device=device)
        self.hit_counts_N = torch.empty(tiles, dtype=torch.int32, device=device)
        self.a_PW = torch.empty(max_tokens, self.width, dtype=pool_RD.dtype, device=device)
        self.counts = counts
        self.overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPS_FROM
        self._dependent = {"launch_pdl": True} if self.overlaps else {}
        assert self.a_PW.numel() < 2**31 and self.weights_PX.numel() < 2**31, "positions are numbered in 32 bits"
        assert counts is None or (counts.shape[1] >= max(max_experts, base_experts) and counts.is_contiguous())

    def plan(self, batch: Batch) -> "TritonStep":
        """Prepare a step, on the current stream. Raises ValueError if it is beyond what the buffers were made for."""
        self._check(batch)
        self.tables.sync()
        self.step_table.write(batch, self.tiling(batch.size).tile)
        return TritonStep(self, batch.size)

    def problem(self, config: AdapterConfig) -> str | None:
        """Why the buffers were not made for an adapter; None if they were. For those who accept adapters."""
        experts, bottleneck = config.num_experts, config.bottleneck
        if experts * bottleneck > self.width:
            return f"found {experts} experts of bottleneck {bottleneck}, expected at most {self.width} columns in all"
        if config.is_routed and experts > self.max_experts:
            return f"found {experts} experts, expected at most {self.max_experts} of variant R"
        if config.variant == "E" and not self.base_top_k:
            return "found variant E, expected another: this base does not give its top-k"
        if config.gate_weight == "base_slot" and not self.has_logits:
            return "found gate_weight base_slot, expected adapter: this base does not give its logits"
        return None

    def tiling(self, tokens: int) -> Tiling:
        """The block sizes of a step of `tokens` tokens."""
        return DECODE if tokens <= self.decode_tokens else PREFILL

    def tiles(self, tokens: int) -> int:
        """The most tiles that a step of `tokens` tokens can have, whatever adapters they belong to."""
        tile = self.tiling(tokens).tile
        return max(1, min(tokens, (tokens + self.max_groups * (tile - 1)) // tile))

    def warm_up(self) -> None:
        """Launch every kernel in every variant once, over no tiles: nothing is compiled while serving."""
        self.step_table.write(Batch(torch.empty(0, dtype=torch.int64), (), 0), DECODE.tile)
        device, dtype = self.pool_RD.device, self.pool_RD.dtype
        x_1D = torch.zeros(1, self.pool_RD.shape[1], dtype=dtype, device=device)
        for tiling, base in itertools.product((DECODE, PREFILL), self._base_types(dtype, device)):
            self.launch_route(tiling, 1, 0, x_1D, *base)
        for tiling in (DECODE, PREFILL):
            self.launch_shrink(tiling, 1, 0, x_1D)
            self.launch_expand(tiling, 1, 0, x_1D)

    def launch_route(
        self, tiling: Tiling, tiles: int, layer: int, x_TD: torch.Tensor,
        logits_TN: torch.Tensor | None, weights_TJ: torch.Tensor | None, ids_TJ: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """See `kernels.route`."""
        own, base = _power_of_two(self.max_experts), _power_of_two(self.base_experts)
        few, some = min(own, FEW_EXPERTS), min(own, SOME_EXPERTS)
        launch(
            kernels.route, (tiles,), *self._common(),
            x_TD,
            self.weights_PX if logits_TN is None else logits_TN,  # a pointer that is not followed
            self.weights_PX if weights_TJ is None else weights_TJ,
            self.hits_NX if ids_TJ is None else ids_TJ,
            self.weights_PX, self.hits_NX, self.hit_counts_N,
            self.hits_NX if self.counts is None else self.counts,
            layer, *self._sizes(), self.base_experts, 0 if self.counts is None else self.counts.shape[1],
            EXPERTS=self.experts,
            FEW_EXPERTS=few, FEW_TOKENS=_tokens(tiling, max(few, base)), FEW_D=self._route_d(tiling, few),
            SOME_EXPERTS=some, SOME_TOKENS=_tokens(tiling, max(some, base)), SOME_D=self._route_d(tiling, some),
            OWN_EXPERTS=own, OWN_TOKENS=_tokens(tiling, max(own, base)), OWN_D=self._route_d(tiling, own),
            BASE_EXPERTS=base, BASE_TOKENS=_tokens(tiling, base), BASE_TOP_K=self.base_top_k,
            HAS_LOGITS=logits_TN is not None, COUNT=self.counts is not None, OVERLAP=self.overlaps,
            num_warps=tiling.route_warps, num_stages=tiling.route_stages,
        )  # fmt: skip

    def launch_shrink(self, tiling: Tiling, tiles: int, layer: int, x_TD: torch.Tensor) -> None:
        """See `kernels.shrink`."""
        blocks = -(-self.width // tiling.shrink_c)
        launch(
            kernels.shrink, (tiles, min(blocks, max(4, SHRINK_PROGRAMS // tiles))), *self._common(),
            x_TD, self.weights_PX, self.hits_NX, self.hit_counts_N, self.a_PW,
            layer, *self._sizes(), self.width,
            TILE=tiling.tile, EXPERTS=self.experts, BLOCK_C=tiling.shrink_c, BLOCK_D=self._block_d(tiling.shrink_d),
            OVERLAP=self.overlaps, **self._dependent, num_warps=tiling.warps, num_stages=tiling.shrink_stages,
        )  # fmt: skip

    def launch_expand(self, tiling: Tiling, tiles: int, layer: int, output_TD: torch.Tensor) -> None:
        """See `kernels.expand`."""
        block_d = self._block_d(tiling.expand_d)
        launch(
            kernels.expand, (tiles, -(-self.pool_RD.shape[1] // block_d)), *self._common(),
            output_TD, self.hits_NX, self.hit_counts_N, self.a_PW,
            layer, *self._sizes(), self.width,
            TILE=tiling.tile, EXPERTS=self.experts, BLOCK_C=tiling.expand_c, BLOCK_D=block_d,
            OVERLAP=self.overlaps, **self._dependent, num_warps=tiling.warps, num_stages=tiling.expand_stages,
        )  # fmt: skip

    def _common(self) -> tuple[torch.Tensor, ...]:
        """The arguments with which every kernel begins: the pool, its tables, the step's."""
        tables = self.tables
        return (self.pool_RD, tables.page_index, tables.layer_offset, tables.meta, *self.step_table.parts)

    def _sizes(self) -> tuple[int, int]:
        return self.tables.layer_offset.shape[1], self.pool_RD.shape[1]

    def _base_types(
        self, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """What a base may give, one of each type that `TritonStep.start` accepts."""
        floats = sorted({dtype, torch.float32}, key=str)
        logits = [torch.zeros(1, self.base_experts, dtype=t, device=device) for t in floats if self.has_logits]
        weights = [torch.zeros(1, self.base_top_k, dtype=t, device=device) for t in floats if self.base_top_k]
        numbers = (torch.int32, torch.int64) if self.base_top_k else ()
        ids = [torch.zeros(1, self.base_top_k, dtype=t, device=device) for t in numbers]
        none: list[torch.Tensor | None] = [None]
        yield from itertools.product(logits or none, weights or none, ids or none)

    def _route_d(self, tiling: Tiling, experts: int) -> int:
        """Columns of D at a time for a router of up to `experts`."""
        return max(SMALLEST_BLOCK, min(self._block_d(tiling.route_d), 2 * ROUTE_CELLS // experts))

    def _block_d(self, columns: int) -> int:
        """Columns of D at a time, of as many bytes as `columns` of two bytes each."""
        return columns * 2 // self.pool_RD.itemsize

    def _check(self, batch: Batch) -> None:
        if batch.size > self.max_tokens or len(batch.groups) > self.max_groups:
            raise ValueError(
                f"found a step of {batch.size} tokens and {len(batch.groups)} adapters, "
                f"expected at most {self.max_tokens} and {self.max_groups}"
            )
        for group in batch.groups:
            problem = self.problem(group.adapter.config)
            if problem is not None:
                raise ValueError(problem)


@dataclass(frozen=True)
class TritonStep:
    """See `perft.operator.base.Step`. size: the tokens it was planned for."""

    operator: TritonOperator
    size: int

    def start(self, layer: int, x_TD: torch.Tensor, base: BaseRouter) -> Delta:
        """Launch what reads x. The base is always asked for all that it can give: a graph must hold every launch."""
        operator, tokens = self.operator, x_TD.shape[0]
        tiling, tiles = operator.tiling(tokens), operator.tiles(tokens)
        if tokens < self.size or tiling is not operator.tiling(self.size):
            raise ValueError(f"found {tokens} tokens in a step that was planned for {self.size}")
        logits_TN = base.logits() if operator.has_logits else None
        weights_TJ, ids_TJ = base.top() if operator.base_top_k else (None, None)
        self._check(x_TD, logits_TN, weights_TJ, ids_TJ)
        operator.launch_route(tiling, tiles, layer, x_TD, logits_TN, weights_TJ, ids_TJ)
        operator.launch_shrink(tiling, tiles, layer, x_TD)

        def add(output_TD: torch.Tensor) -> None:
            assert output_TD.is_contiguous() and output_TD.shape == x_TD.shape and output_TD.dtype == x_TD.dtype
            operator.launch_expand(tiling, tiles, layer, output_TD)

        return add

    def _check(
        self,
        x_TD: torch.Tensor,
        logits_TN: torch.Tensor | None,
        weights_TJ: torch.Tensor | None,
        ids_TJ: torch.Tensor | None,
    ) -> None:
        """That no other kernels are needed than those `TritonOperator.warm_up` compiled."""
        tokens, dtype = x_TD.shape[0], x_TD.dtype
        assert dtype == self.operator.pool_RD.dtype and x_TD.is_contiguous() and tokens <= self.operator.max_tokens
        if logits_TN is not None:
            assert logits_TN.dtype in (dtype, torch.float32) and logits_TN.is_contiguous()
            assert logits_TN.shape == (tokens, self.operator.base_experts)
        if weights_TJ is not None and ids_TJ is not None:
            assert weights_TJ.dtype in (dtype, torch.float32) and weights_TJ.is_contiguous()
            assert ids_TJ.dtype in (torch.int32, torch.int64) and ids_TJ.is_contiguous()
            assert weights_TJ.shape == ids_TJ.shape == (tokens, self.operator.base_top_k)


class StepTable:
    """perm_T, tile_slot_N, tile_start_N, tile_len_N (int32, in `parts`): which tokens make up which tile of which slot.

    They lie in one buffer on the device, which one asynchronous copy fills; what holds no tile is -1.
    """

    def __init__(self, tokens: int, tiles: int, device: torch.device) -> None:
        self._tokens, self._tiles = tokens, _multiple(tiles, 4)  # each part begins at 16 bytes
        shape = (_multiple(tokens, 4) + 3 * self._tiles,)
        is_cuda = device.type == "cuda"
        self._buffer = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._staging = [torch.empty(shape, dtype=torch.int32, pin_memory=is_cuda) for _ in range(STAGING_SLOTS)]
        self._copied = [_event() for _ in range(STAGING_SLOTS)] if is_cuda else []
        self._next = 0
        self.parts = self._split(self._buffer)

    def write(self, batch: Batch, tile: int) -> None:
        """Lay out a batch in tiles of up to `tile` tokens, and send it on its way on the current stream."""
        staging = self._staging[self._next]
        if self._copied:
            self._copied[self._next].synchronize()  # of the copy STAGING_SLOTS steps ago
        staging.fill_(-1)
        perm, slots, starts, lengths = (part.numpy() for part in self._split(staging))
        perm[: batch.tokens_n.numel()] = batch.tokens_n.numpy()
        count = 0
        for group in batch.groups:
            first = np.arange(group.start, group.stop, tile)
            part = slice(count, count + first.size)
            slots[part] = group.adapter.slot
            starts[part] = first
            lengths[part] = np.minimum(tile, group.stop - first)
            count += first.size
        self._buffer.copy_(staging, non_blocking=True)
        if self._copied:
            self._copied[self._next].record()
        self._next = (self._next + 1) % STAGING_SLOTS

    def _split(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        perm, tiles = buffer[: self._tokens], buffer[-3 * self._tiles :]
        return (perm, *torch.split(tiles, self._tiles))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _tokens(tiling: Tiling, columns: int) -> int:
    """Tokens of a tile that `route` holds at once."""
    return min(tiling.tile, max(SMALLEST_BLOCK, ROUTE_CELLS // columns))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is a side of a block and not below `number`."""
    return max(SMALLEST_BLOCK, 1 << (number - 1).bit_length())


def make_triton_operator(pool_RD: torch.Tensor, tables: SlotTables, sizes: Sizes) -> TritonOperator:
    """The back end for an engine's steps, with every kernel compiled."""
    operator = TritonOperator(
        pool_RD,
        tables,
        max_tokens=sizes.max_tokens,
        max_groups=sizes.max_groups,
        width=MAX_COLUMNS,
        max_experts=MAX_ROUTED_EXPERTS,
        base_experts=sizes.base_experts,
        base_top_k=sizes.base_top_k,
        decode_tokens=max(DECODE_TOKENS, sizes.captured_tokens),  # a step and the graph it is padded to: alike
    )
    operator.warm_up()
    return operator
