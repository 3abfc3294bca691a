"""Owns the tables by which a kernel finds the rows of an adapter: what lies where, and how its delta is computed.

The pool's rows come in pages of PAGE_ROWS. An adapter that is on the device has a slot; its rows, one layer's block
[router M, down M * B, up M * B] after the other, are numbered from 0, and logical row r of slot s is row

    page_index[meta[s, INDEX] + r // PAGE_ROWS] * PAGE_ROWS + r % PAGE_ROWS

of the pool. Invariant: the tables lie at fixed addresses, and the entries of a slot do not change while it is taken.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from perft.config import AdapterConfig

PAGE_ROWS = 16
"""Rows of a page. The row counts of adapters and pools are multiples of it."""

VARIANTS = ("R", "E", "D", "S")
ACTIVATIONS = (None, "silu", "relu", "gelu")
RENORMALIZE, BASE_SLOT = 1, 2
"""Bits of `Meta.FLAGS`."""


class Meta(IntEnum):
    """Columns of `SlotTables.meta`. TOP_K: experts a token uses; 0 for E, where the base says. INDEX: the slot's first
    entry in `page_index`."""

    VARIANT = 0
    ACTIVATION = 1
    EXPERTS = 2
    TOP_K = 3
    BOTTLENECK = 4
    FLAGS = 5
    INDEX = 6


class SlotTables:
    """page_index int32 [I], layer_offset int32 [L, S] (the first logical row of a layer's block; -1: the adapter is not
    in that layer), meta int32 [S, 8].

    S is the number of pages, so slots never run out before rows do. The entries of one slot in `page_index` lie
    together; I is large enough for first-fit to find such a run always (`index_entries`). `host` are the arrays that
    `write` fills; on the CPU the tensors are the same memory, elsewhere `sync` copies what changed.
    """

    def __init__(self, pages: int, layers: int, device: torch.device) -> None:
        entries = index_entries(pages)
        self._host = (
            torch.zeros(entries, dtype=torch.int32),
            torch.full((layers, pages), -1, dtype=torch.int32),
            torch.zeros((pages, len(Meta) + 1), dtype=torch.int32),
        )
        self._is_copied = device.type != "cpu"
        on_device = tuple(table.to(device) for table in self._host) if self._is_copied else self._host
        self.page_index, self.layer_offset, self.meta = on_device
        self._changed: list[tuple[int, int, int]] = []

    def write(self, slot: int, config: AdapterConfig, layers: Sequence[int], index: int, pages: Sequence[int]) -> None:
        """Describe an adapter: its pages (in order) go to `page_index` from `index` on."""
        page_index, layer_offset, meta = self._host
        page_index[index : index + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        layer_offset[:, slot] = -1
        for place, layer in enumerate(layers):
            layer_offset[layer, slot] = place * config.rows_per_layer()
        meta[slot, : len(Meta)] = torch.from_numpy(_described(config, index))
        if self._is_copied:
            self._changed.append((slot, index, len(pages)))

    def sync(self) -> None:
        """Copy what `write` changed to the device, on the current stream. To be called between two steps.

        From memory that is not page-locked: such a copy has read its source when it returns, and a few hundred bytes,
        only after an adapter came, cost nothing.
        """
        while self._changed:
            slot, index, pages = self._changed.pop()
            part = slice(index, index + pages)
            self.page_index[part].copy_(self._host[0][part], non_blocking=True)
            self.layer_offset[:, slot].copy_(self._host[1][:, slot].clone(), non_blocking=True)
            self.meta[slot].copy_(self._host[2][slot], non_blocking=True)


def index_entries(pages: int) -> int:
    """Entries of `page_index` with which first-fit never fails for runs that together hold at most `pages` entries.

    First-fit needs at most n log2(n) words for requests of together n words (J. M. Robson, "Worst case fragmentation
    of first fit and best fit storage allocation strategies", The Computer Journal 20, 1977).
    """
    return pages * (1 + max(1, pages).bit_length())


def pool_rows(rows: int) -> int:
    """Rows that `rows` rows take in the pool: whole pages."""
    return -(-rows // PAGE_ROWS) * PAGE_ROWS


def adapter_rows(config: AdapterConfig, moe_layers: tuple[int, ...]) -> int:
    """Rows that an adapter takes in the pool of a base with these MoE layers."""
    return pool_rows(config.rows_per_layer() * len(config.layer_indices(moe_layers)))


def _described(config: AdapterConfig, index: int) -> np.ndarray:
    """One row of `SlotTables.meta`."""
    row = np.zeros(len(Meta), dtype=np.int32)
    row[Meta.VARIANT] = VARIANTS.index(config.variant)
    row[Meta.ACTIVATION] = ACTIVATIONS.index(config.activation)
    row[Meta.EXPERTS] = config.num_experts
    row[Meta.TOP_K] = 0 if config.variant == "E" else config.top_k or config.num_experts
    row[Meta.BOTTLENECK] = config.bottleneck
    row[Meta.FLAGS] = RENORMALIZE * bool(config.renormalize) + BASE_SLOT * (config.gate_weight == "base_slot")
    row[Meta.INDEX] = index
    return row
