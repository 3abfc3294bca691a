"""Owns the row pool: one [R, D] tensor that holds every resident adapter's rows, of all layers and ranks alike.

Invariant: every page of rows is either free or belongs to exactly one adapter (`check_integrity`). An adapter takes
the pages that its rows fill, wherever they are free: nothing is ever moved, and at most PAGE_ROWS - 1 rows of an
adapter are unused. One thread may fill rows while a step reads others on another thread: a lock guards what is free.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perft.config import AdapterConfig
from perft.operator.base import LayerRows, PlacedAdapter, Rows
from perft.operator.free_runs import FreeRuns, runs_of
from perft.operator.tables import PAGE_ROWS, SlotTables, pool_rows
from perft.reference import LayerWeights

STAGING_BYTES = 32 * 2**20
"""Page-locked memory through which rows go to a GPU."""


class PoolFullError(RuntimeError):
    """An adapter needs more rows than are free."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"too_many_rows: the adapter takes {needed} rows, the pool has {free} free of {total}: "
            "serve fewer or smaller adapters, or enlarge the pool (--pool-rows)"
        )


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter made ready on the host: its rows [rows, D], layer after layer, each router, down and up rows."""

    config: AdapterConfig
    layers: tuple[int, ...]
    rows_RD: torch.Tensor

    @property
    def rows(self) -> int:
        """Rows that it takes in a pool: whole pages."""
        return pool_rows(self.rows_RD.shape[0])

    def block(self, layer: int) -> torch.Tensor:
        """The rows of one layer."""
        start = self.layers.index(layer) * self.config.rows_per_layer()
        return self.rows_RD[start : start + self.config.rows_per_layer()]

    def overflow_violations(self) -> list[str]:
        """Each tensor with values that are not finite in the dtype it is served in.

        The store may have accepted the adapter for a model of another dtype.
        """
        router_rows, half = self.config.router_rows, self.config.num_experts * self.config.bottleneck
        parts = {"router": router_rows, "down_proj": half, "up_proj": half}
        found: list[str] = []
        for layer in self.layers:
            for name, rows in zip(parts, torch.split(self.block(layer), list(parts.values())), strict=True):
                if rows.numel() and not all(torch.isfinite(end) for end in torch.aminmax(rows)):
                    found.append(
                        f"layers.{layer}.{name}: found values that overflow {rows.dtype}, the dtype of the served "
                        "model: serve it in a wider one (--dtype), or upload an adapter with smaller values"
                    )
        return found


def pack(config: AdapterConfig, layers: dict[int, LayerWeights], output_scale: float = 1.0) -> PackedAdapter:
    """Lay out an adapter's tensors as rows of width D; up_proj [M, D, B] becomes M * B rows, `scale` folded in.

    output_scale: what the model multiplies the experts' output by once the delta is in it. PERFT-E's delta belongs to
    the experts and is multiplied with them; that of the other variants is divided by it beforehand.
    """
    scale = config.scale if config.variant == "E" else config.scale / output_scale
    parts: list[torch.Tensor] = []
    for weights in layers.values():
        parts += [] if weights.router is None else [weights.router]
        parts += [weights.down_proj.flatten(0, 1), (weights.up_proj * scale).transpose(1, 2).flatten(0, 1)]
    return PackedAdapter(config, tuple(layers), torch.cat(parts))


class RowPool:
    """The pool's tensor and who has which pages, by digest.

    rows: rounded down to whole pages. layers: decoder layers of the model, for the tables.
    """

    def __init__(self, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device, layers: int) -> None:
        pages = rows // PAGE_ROWS
        self.tensor_RD = torch.empty(pages * PAGE_ROWS, hidden_size, dtype=dtype, device=device)
        self.tables = SlotTables(pages, layers, device)
        self._lock = threading.RLock()
        self._copying = threading.Lock()
        self._writes: torch.cuda.Stream | None = None
        self._staging: torch.Tensor | None = None
        if device.type == "cuda":
            self._writes = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            staging_rows = max(PAGE_ROWS, STAGING_BYTES // (hidden_size * dtype.itemsize))
            self._staging = torch.empty(staging_rows, hidden_size, dtype=dtype, pin_memory=True)
        self._free_pages, self._free_slots = FreeRuns(pages), FreeRuns(pages)
        self._free_entries = FreeRuns(self.tables.page_index.numel())
        self._taken: dict[str, Taken] = {}
        self._placed: dict[str, PlacedAdapter] = {}

    @property
    def total(self) -> int:
        return self.tensor_RD.shape[0]

    @property
    def used(self) -> int:
        """Rows that are taken, those of a copy under way included."""
        with self._lock:
            return self.total - PAGE_ROWS * len(self._free_pages)

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
        assert adapter.rows_RD.shape[1] == self.tensor_RD.shape[1]
        with self._lock:
            if digest in self._placed:
                return self._placed[digest]
            free = self.total - self.used
            if adapter.rows > free:
                raise PoolFullError(adapter.rows, free, self.total)
            taken = self._take(adapter.rows // PAGE_ROWS)
        try:
            self._copy(adapter.rows_RD, taken.pages)
        except BaseException:
            with self._lock:
                self._give_back(taken)
            raise
        placed = PlacedAdapter(adapter.config, _layer_rows(adapter, taken.pages, self.tensor_RD.device), taken.slot)
        with self._lock:
            self.tables.write(taken.slot, adapter.config, adapter.layers, taken.entry, taken.pages)
            self._taken[digest] = taken
            self._placed[digest] = placed
        return placed

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
        """Raises AssertionError unless free and taken pages, slots and index entries make up the whole, each once."""
        taken = self._taken.values()
        entries = [entry for t in taken for entry in range(t.entry, t.entry + len(t.pages))]
        for free, used, total in (
            (self._free_pages, [page for t in taken for page in t.pages], self.total // PAGE_ROWS),
            (self._free_slots, [t.slot for t in taken], self.total // PAGE_ROWS),
            (self._free_entries, entries, self.tables.page_index.numel()),
        ):
            numbers = sorted([*used, *(number for run in free for number in run)])
            assert numbers == list(range(total)), (free, used)
        assert self._taken.keys() == self._placed.keys()
        for digest, t in self._taken.items():
            assert self._placed[digest].slot == t.slot

    def _take(self, pages: int) -> "Taken":
        """Pages, a slot and entries of the page index; there are always enough of the two if there are of pages."""
        entry, slot = self._free_entries.take_first(pages), self._free_slots.take_first(1)
        return Taken(tuple(self._free_pages.take(pages)), slot, entry)

    def _give_back(self, taken: "Taken") -> None:
        self._free_pages.give(sorted(taken.pages))
        self._free_slots.give([taken.slot])
        self._free_entries.give(range(taken.entry, taken.entry + len(taken.pages)))

    def _copy(self, rows_RD: torch.Tensor, pages: Sequence[int]) -> None:
        """Copy rows into pages, run by run; to a GPU through page-locked memory, beside the steps."""
        start = 0
        for run in runs_of(pages):
            part = rows_RD[start : start + len(run) * PAGE_ROWS]
            target = self.tensor_RD[run.start * PAGE_ROWS : run.start * PAGE_ROWS + part.shape[0]]
            start += part.shape[0]
            if self._staging is None:
                target.copy_(part)
                continue
            with torch.cuda.stream(self._writes):
                for first in range(0, len(part), len(self._staging)):
                    staged = self._staging[: len(part) - first]
                    staged.copy_(part[first : first + len(staged)])
                    target[first : first + len(staged)].copy_(staged, non_blocking=True)
                    assert self._writes is not None
                    self._writes.synchronize()


@dataclass(frozen=True)
class Taken:
    """What one adapter has: its pages in order, its slot, the first of its entries in the page index."""

    pages: tuple[int, ...]
    slot: int
    entry: int


def _layer_rows(adapter: PackedAdapter, pages: Sequence[int], device: torch.device) -> dict[int, LayerRows]:
    """Where each part of each layer lies in the pool."""
    page_P = torch.tensor(pages, dtype=torch.int64)
    row_R = (page_P[:, None] * PAGE_ROWS + torch.arange(PAGE_ROWS)).flatten()
    config = adapter.config
    router_rows, half, per_layer = config.router_rows, config.num_experts * config.bottleneck, config.rows_per_layer()

    def rows(start: int, count: int) -> Rows:
        part = row_R[start : start + count]
        first = int(part[0])
        return slice(first, first + count) if _is_run(part) else part.to(device)

    return {
        layer: LayerRows(
            router=rows(i * per_layer, router_rows) if router_rows else None,
            down=rows(i * per_layer + router_rows, half),
            up=rows(i * per_layer + router_rows + half, half),
        )
        for i, layer in enumerate(adapter.layers)
    }


def _is_run(rows: torch.Tensor) -> bool:
    return bool((rows.diff() == 1).all())
