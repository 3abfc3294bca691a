"""Owns the row pool: one [R, D] tensor that holds every resident adapter's rows, of all layers and ranks alike.

Invariant: every row is either free or belongs to exactly one adapter (`check_integrity`). An adapter is charged the
rows it really has; they form one run where there is room for one, else several, so fragmentation wastes no row.
One thread may fill rows while a step reads others on another thread: a lock guards what is free.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perft.config import AdapterConfig
from perft.operator.base import LayerRows, PlacedAdapter, Rows
from perft.reference import LayerWeights


class PoolFullError(RuntimeError):
    """An adapter needs more rows than are free."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"too_many_rows: the adapter takes {needed} rows, the pool has {free} free of {total}: "
            "serve fewer or smaller adapters, or enlarge the pool (--pool-rows)"
        )


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter made ready on the host: per layer one [rows, D] block of router, down and up rows, in that order."""

    config: AdapterConfig
    blocks: dict[int, torch.Tensor]

    @property
    def rows(self) -> int:
        return sum(block.shape[0] for block in self.blocks.values())

    def overflow_violations(self) -> list[str]:
        """Each tensor with values that are not finite in the dtype it is served in.

        The store may have accepted the adapter for a model of another dtype.
        """
        router_rows, half = self.config.router_rows, self.config.num_experts * self.config.bottleneck
        parts = {"router": router_rows, "down_proj": half, "up_proj": half}
        found: list[str] = []
        for layer, block in self.blocks.items():
            for name, rows in zip(parts, torch.split(block, list(parts.values())), strict=True):
                if rows.numel() and not all(torch.isfinite(end) for end in torch.aminmax(rows)):
                    found.append(
                        f"layers.{layer}.{name}: found values that overflow {block.dtype}, the dtype of the served "
                        "model: serve it in a wider one (--dtype), or upload an adapter with smaller values"
                    )
        return found

    def pinned(self) -> "PackedAdapter":
        """The same in page-locked memory, from which a device copies without the CPU."""
        return PackedAdapter(self.config, {layer: block.pin_memory() for layer, block in self.blocks.items()})


def pack(config: AdapterConfig, layers: dict[int, LayerWeights]) -> PackedAdapter:
    """Lay out an adapter's tensors as rows of width D; up_proj [M, D, B] becomes M * B rows, `scale` folded in."""
    blocks: dict[int, torch.Tensor] = {}
    for layer, weights in layers.items():
        parts = [] if weights.router is None else [weights.router]
        parts += [weights.down_proj.flatten(0, 1), (weights.up_proj * config.scale).transpose(1, 2).flatten(0, 1)]
        blocks[layer] = torch.cat(parts).contiguous()
    return PackedAdapter(config, blocks)


class RowPool:
    """The pool's tensor and who has which rows, by digest."""

    def __init__(self, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor_RD = torch.empty(rows, hidden_size, dtype=dtype, device=device)
        self._lock = threading.RLock()
        self._copying = threading.Lock()
        self._writes = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: list[range] = [range(rows)]
        self._taken: dict[str, list[range]] = {}
        self._placed: dict[str, PlacedAdapter] = {}

    @property
    def total(self) -> int:
        return self.tensor_RD.shape[0]

    @property
    def used(self) -> int:
        """Rows that are taken, those of a copy under way included."""
        with self._lock:
            return self.total - sum(map(len, self._free))

    def digests(self) -> list[str]:
        """Every adapter that is whole in the pool."""
        with self._lock:
            return list(self._placed)

    def get(self, digest: str) -> PlacedAdapter | None:
        return self._placed.get(digest)

    def put(self, digest: str, adapter: PackedAdapter) -> PlacedAdapter:
        """Copy an adapter in; it is there (`get`) once all of it is.

        Raises PoolFullError if its rows do not fit. Whatever it raises, no row is taken.
        """
        with self._copying:  # two copies of one adapter must not take rows twice
            return self._put(digest, adapter)

    def _put(self, digest: str, adapter: PackedAdapter) -> PlacedAdapter:
        assert all(block.shape[1] == self.tensor_RD.shape[1] for block in adapter.blocks.values())
        with self._lock:
            if digest in self._placed:
                return self._placed[digest]
            free = self.total - self.used
            if adapter.rows > free:
                raise PoolFullError(adapter.rows, free, self.total)
            runs = {layer: self._take(block.shape[0]) for layer, block in adapter.blocks.items()}
        taken = [run for parts in runs.values() for run in parts]
        try:
            with torch.cuda.stream(self._writes):
                layers = {layer: self._place(adapter.config, adapter.blocks[layer], runs[layer]) for layer in runs}
            if self._writes is not None:
                self._writes.synchronize()
        except BaseException:
            with self._lock:
                self._give_back(taken)
            raise
        with self._lock:
            self._taken[digest] = taken
            self._placed[digest] = PlacedAdapter(adapter.config, layers)
        return self._placed[digest]

    def remove(self, digest: str) -> None:
        """Free an adapter's rows; a later write waits for the steps that still read them.

        Raises KeyError if it is not here.
        """
        if self._writes is not None:
            self._writes.wait_stream(torch.cuda.current_stream(self.tensor_RD.device))
        with self._lock:
            del self._placed[digest]
            self._give_back(self._taken.pop(digest))

    def check_integrity(self) -> None:
        """Raises AssertionError unless free and taken rows make up the pool, each once."""
        runs = sorted([*self._free, *(run for taken in self._taken.values() for run in taken)], key=lambda r: r.start)
        edges = [0, *(run.stop for run in runs)]
        assert [run.start for run in runs] == edges[:-1] and edges[-1] == self.total, runs
        assert self._taken.keys() == self._placed.keys()

    def _take(self, count: int) -> list[range]:
        """`count` free rows: the smallest run that holds them all, else the largest runs until they do."""
        fitting = [run for run in self._free if len(run) >= count]
        chosen = [min(fitting, key=len)] if fitting else sorted(self._free, key=len, reverse=True)
        taken: list[range] = []
        for run in chosen:
            part = run[: count - sum(map(len, taken))]
            if part:
                self._free.remove(run)
                if len(part) < len(run):
                    self._free.append(run[len(part) :])
                taken.append(part)
        return taken

    def _give_back(self, runs: Sequence[range]) -> None:
        """Free rows; runs that touch become one."""
        merged: list[range] = []
        for run in sorted([*self._free, *runs], key=lambda run: run.start):
            if merged and merged[-1].stop == run.start:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                merged.append(run)
        self._free = merged

    def _place(self, config: AdapterConfig, block: torch.Tensor, runs: Sequence[range]) -> LayerRows:
        """Copy one layer's block into `runs` and say where its parts are."""
        start = 0
        for run in runs:
            self.tensor_RD[run.start : run.stop].copy_(block[start : start + len(run)], non_blocking=True)
            start += len(run)
        router_rows, half = config.router_rows, config.num_experts * config.bottleneck
        return LayerRows(
            router=self._rows(runs, 0, router_rows) if router_rows else None,
            down=self._rows(runs, router_rows, router_rows + half),
            up=self._rows(runs, router_rows + half, router_rows + 2 * half),
        )

    def _rows(self, runs: Sequence[range], start: int, stop: int) -> Rows:
        """The pool's rows of entries start..stop of a block that lies in `runs`."""
        if len(runs) == 1:
            return slice(runs[0].start + start, runs[0].start + stop)
        index = [row for run in runs for row in run][start:stop]
        return torch.tensor(index, dtype=torch.int64, device=self.tensor_RD.device)
