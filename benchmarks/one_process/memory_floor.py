"""What a step's rows cost to read at least: once, from memory, summed up and nothing else, on all threads.

    python -m benchmarks.one_process.memory_floor [--rounds 8]

The operator cannot be quicker than this where its rows come from memory: between two steps the base's weights pass
through the caches. Read are as many rows as R (M 4, K 2, D_B 16) uses in every layer if all experts are equally likely.
"""

import statistics
import time
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.workload import routed, rows_of, shape_of
from perft.config import AdapterConfig
from perft.operator.cpu.backend import THREADING
from perft.operator.tables import PAGE_ROWS

CELLS = ((32, 8), (32, 32), (8, 8))
"""Requests and adapters."""


@njit(parallel=True, fastmath=True, nogil=True)  # type: ignore[untyped-decorator]
def read(pages_PW: Any, chosen_p: Any, threads: int) -> Any:
    """The sum of these pages, each thread a part of them."""
    sums = np.zeros(threads, np.float32)
    for thread in prange(threads):
        total = np.float32(0)
        for p in range(thread * len(chosen_p) // threads, (thread + 1) * len(chosen_p) // threads):
            page_W = pages_PW[chosen_p[p]]
            for w in range(page_W.shape[0]):
                total += page_W[w]
        sums[thread] = total
    return sums


def rows_used(config: AdapterConfig, tokens: int) -> float:
    """Rows of one layer that this many tokens of one adapter use, on average."""
    experts, top_k = config.num_experts, config.top_k or config.num_experts
    hit = experts * (1 - (1 - top_k / experts) ** tokens)
    return experts + hit * 2 * config.bottleneck


def main() -> None:
    options = parser(__doc__, rounds=8).parse_args()
    shape, config = shape_of(base_of(options)), AdapterConfig.model_validate(routed())
    report, generator = Report("memory_floor", options), np.random.default_rng(options.seed)
    rounds, threads, layers = 1 if options.quick else options.rounds, torch.get_num_threads(), len(shape.moe_layers)
    numba.config.THREADING_LAYER_PRIORITY = THREADING
    numba.set_num_threads(threads)
    pool_pages = max(adapters for _, adapters in CELLS) * rows_of(shape, routed()) // PAGE_ROWS
    pages_PW = generator.random((pool_pages, PAGE_ROWS * shape.hidden_size), dtype=np.float32)
    read(pages_PW, np.arange(threads), threads)
    rows: list[list[str]] = []
    for requests, adapters in CELLS:
        pages = round(adapters * rows_used(config, requests // adapters) / PAGE_ROWS)
        milliseconds: list[float] = []
        for _ in range(rounds):
            order_p = generator.permutation(pool_pages)
            began = time.perf_counter()
            for layer in range(layers):
                read(pages_PW, np.take(order_p, range(layer * pages, (layer + 1) * pages), mode="wrap"), threads)
            milliseconds.append(1e3 * (time.perf_counter() - began))
        megabytes, median = layers * pages * pages_PW[0].nbytes / 1e6, statistics.median(milliseconds)
        found = f"{median:.2f} ({min(milliseconds):.2f} to {max(milliseconds):.2f})"
        rows.append([f"{requests}", f"{adapters}", f"{megabytes:.0f}", found, f"{megabytes / median:.0f}"])
        report.raw[f"{requests} requests, {adapters} adapters, ms"] = milliseconds
    header = ("requests", "adapters", "MB a step", "ms a step, median (range)", "GB/s")
    report.table("Reading the rows of a step once", header, rows)
    report.write()


if __name__ == "__main__":
    main()
