"""How long do the Triton kernels take for one layer, beside the time that their memory traffic alone would take?

    python -m benchmarks.kernels                                      # on a GPU, without vLLM; about two minutes
    TRITON_INTERPRET=1 python -m benchmarks.kernels --shapes tiny     # under Triton's interpreter: only that it runs

For each shape, variant, number of tokens and of different adapters: route, shrink, expand, and all of one layer, from a
CUDA graph over so many layers that their rows do not stay in the cache; with the buffers that an engine makes.
The floor is the bytes that must be read and written once (rows of selected experts, routers, x, the output) over the
bandwidth of a copy, measured here. Weights are random: timing asks for nothing else, and tests hold the results to the
reference.

The base's MoE layer is measured as its two grouped products alone (torch's grouped_mm), without routing, activation and
sum; its floor is the larger of the bytes of the experts that the tokens use over the bandwidth, and the operations over
the rate of a large product. Both are less than a real layer takes, so that shares of the base come out too high.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.common.report import RESULTS, facts
from perft.config import AdapterConfig
from perft.operator.base import Batch, PlacedAdapter, TokenGroup
from perft.operator.gpu.backend import MAX_COLUMNS, MAX_ROUTED_EXPERTS, TritonOperator
from perft.operator.tables import PAGE_ROWS, SlotTables, pool_rows

LAYERS = 8
"""At least so many layers a measurement, and more until they read CACHE_BYTES."""
CACHE_BYTES = 2**27
REPEATS = 30
DTYPE = torch.bfloat16
COPY_BYTES = 2**30
PRODUCT_SIDE = 8192


@dataclass(frozen=True)
class Shape:
    """A base: D, N, J, and the width of one of its experts."""

    hidden_size: int
    base_experts: int
    base_top_k: int
    intermediate_size: int


SHAPES = {
    "OLMoE": Shape(2048, 64, 8, 1024),
    "Mixtral-8x7B": Shape(4096, 8, 2, 14336),
    "Qwen3-30B-A3B": Shape(2048, 128, 8, 768),
    "tiny": Shape(48, 4, 2, 32),
}
TOKENS = (1, 8, 32, 256, 2048, 8192)
ADAPTERS = (1, 8, 32)


@dataclass
class Base:
    """What a base router says: random."""

    logits_TN: torch.Tensor
    weights_TJ: torch.Tensor
    ids_TJ: torch.Tensor

    def logits(self) -> torch.Tensor:
        return self.logits_TN

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights_TJ, self.ids_TJ

    def weights(self) -> torch.Tensor:
        raise AssertionError


def config_of(variant: str, shape: Shape) -> AdapterConfig:
    """R with M 8, K 2, B 16, or E with B 16."""
    routed = (
        {"num_experts": 8, "top_k": 2, "renormalize": True} if variant == "R" else {"num_experts": shape.base_experts}
    )
    common = {"base_model_name_or_path": "", "variant": variant, "expert_type": "lora", "alpha": 32.0, "bottleneck": 16}
    return AdapterConfig.model_validate(common | routed)


class Bench:
    """One shape and variant: a pool of random rows, `adapters` adapters on scattered pages, and the operator."""

    def __init__(self, shape: Shape, variant: str, adapters: int, max_tokens: int, device: torch.device) -> None:
        self.shape, self.device, self.config = shape, device, config_of(variant, shape)
        read = adapters * 2 * self.config.bottleneck * (self.config.top_k or shape.base_top_k) * shape.hidden_size
        self.layers = LAYERS if device.type == "cpu" else max(LAYERS, CACHE_BYTES // (read * DTYPE.itemsize))
        per_adapter = pool_rows(self.layers * self.config.rows_per_layer()) // PAGE_ROWS
        pages = torch.randperm(adapters * per_adapter)
        self.pool_RD = torch.randn(len(pages) * PAGE_ROWS, shape.hidden_size, dtype=DTYPE, device=device)
        self.tables = SlotTables(len(pages), self.layers, device)
        for slot, own in enumerate(pages.split(per_adapter)):
            self.tables.write(slot, self.config, range(self.layers), slot * per_adapter, own.tolist())
        self.operator = TritonOperator(
            self.pool_RD, self.tables, max_tokens=max_tokens, max_groups=max(ADAPTERS),
            width=MAX_COLUMNS, max_experts=MAX_ROUTED_EXPERTS,
            base_experts=shape.base_experts, base_top_k=shape.base_top_k,
        )  # fmt: skip

    def measure(self, tokens: int, adapters: int, bandwidth: float) -> dict[str, Any]:
        """Microseconds for one layer, and the floor."""
        x_TD = torch.randn(tokens, self.shape.hidden_size, dtype=DTYPE, device=self.device)
        output_TD = torch.zeros_like(x_TD)
        logits_TN = torch.randn(tokens, self.shape.base_experts, device=self.device)
        weights_TJ, ids_TJ = torch.softmax(logits_TN, -1).topk(self.shape.base_top_k)
        base = Base(logits_TN, weights_TJ, ids_TJ.int())
        owner_T = torch.randint(adapters, (tokens,))
        owner_T[:adapters] = torch.arange(adapters)
        bounds = [0, *torch.bincount(owner_T, minlength=adapters).cumsum(0).tolist()]
        groups = [
            TokenGroup(PlacedAdapter(self.config, {}, slot), start, stop)
            for slot, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        step = self.operator.plan(Batch(owner_T.argsort(), groups, tokens))
        operator, tiling, tiles = self.operator, self.operator.tiling(tokens), self.operator.tiles(tokens)
        found: dict[str, Any] = {"tokens": tokens, "adapters": adapters, "layers": self.layers}
        found["all"] = self._time(lambda layer: step.start(layer, x_TD, base)(output_TD))
        found["route"] = self._time(
            lambda layer: operator.launch_route(tiling, tiles, layer, x_TD, logits_TN, *base.top())
        )
        weights_PM = operator.weights_PX[:, : self.config.num_experts]
        used = sum(int((weights_PM[a:b] != 0).any(0).sum()) for a, b in itertools.pairwise(bounds))
        found["shrink"] = self._time(lambda layer: operator.launch_shrink(tiling, tiles, layer, x_TD))
        found["expand"] = self._time(lambda layer: operator.launch_expand(tiling, tiles, layer, output_TD))
        rows = 2 * used * self.config.bottleneck + adapters * self.config.router_rows + 3 * tokens
        found["floor"] = 1e6 * rows * self.shape.hidden_size * DTYPE.itemsize / bandwidth
        return found

    def _time(self, run: Callable[[int], None]) -> float:
        """Median microseconds for one layer."""
        run(0)  # compiles
        return 1e6 * seconds(lambda: [run(layer) for layer in range(self.layers)], self.device) / self.layers


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of `run`, as a CUDA graph where there is a device."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.randint(255, (COPY_BYTES if device.type == "cuda" else 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device) -> float:
    """Operations per second of one large product."""
    side = PRODUCT_SIDE if device.type == "cuda" else 256
    left, right = (torch.randn(side, side, dtype=DTYPE, device=device) for _ in range(2))
    left @ right
    return 2 * side**3 / seconds(lambda: left @ right, device)


def base_layer(shape: Shape, tokens: int, machine: "Machine") -> dict[str, float]:
    """Microseconds of the base's two grouped products, and the floor of any MoE layer of the shape."""
    device, width, hidden_size = machine.device, shape.intermediate_size, shape.hidden_size
    picks = tokens * shape.base_top_k
    ids_TJ = torch.rand(tokens, shape.base_experts, device=device).topk(shape.base_top_k).indices
    counts_N = torch.bincount(ids_TJ.flatten(), minlength=shape.base_experts)
    ends_N = counts_N.cumsum(0).int()
    x_PD = torch.randn(picks, hidden_size, dtype=DTYPE, device=device)
    a_PI = torch.randn(picks, width, dtype=DTYPE, device=device)
    gate_up = torch.randn(shape.base_experts, 2 * width, hidden_size, dtype=DTYPE, device=device).transpose(1, 2)
    down = torch.randn(shape.base_experts, hidden_size, width, dtype=DTYPE, device=device).transpose(1, 2)

    def run() -> None:
        torch._grouped_mm(x_PD, gate_up, offs=ends_N)
        torch._grouped_mm(a_PI, down, offs=ends_N)

    run()
    weights = 3 * width * hidden_size
    floor = max(
        int((counts_N > 0).sum()) * weights * DTYPE.itemsize / machine.bandwidth,
        2 * picks * weights / machine.product_rate,
    )
    return {"tokens": tokens, "base": 1e6 * seconds(run, device), "base_floor": 1e6 * floor}


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second. product_rate: operations a second."""

    device: torch.device
    bandwidth: float
    product_rate: float


def results(names: list[str], tokens: list[int], machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for each combination."""
    for name in names:
        base = {count: base_layer(SHAPES[name], count, machine) for count in tokens}
        for variant, adapters in itertools.product(("R", "E"), ADAPTERS):
            bench = Bench(SHAPES[name], variant, adapters, max(tokens), machine.device)
            for count in (count for count in tokens if count >= adapters):
                row = {"shape": name, "variant": variant, **base[count]}
                yield row | bench.measure(count, adapters, machine.bandwidth)
            del bench


HEADER = (
    "shape", "variant", "tokens", "adapters", "route", "shrink", "expand", "all", "floor", "all / floor",
    "base: products", "base: floor", "all / products", "all / base floor",
)  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    """The table's line."""
    times = [f"{row[part]:.1f}" for part in ("route", "shrink", "expand", "all", "floor")]
    shares = [f"{row['all'] / row[part]:.1%}" for part in ("base", "base_floor")]
    names = [str(row[part]) for part in ("shape", "variant", "tokens", "adapters")]
    return [
        *names, *times, f"{row['all'] / row['floor']:.1f}", f"{row['base']:.0f}", f"{row['base_floor']:.0f}", *shares,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON that a GPU's results go to")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    found, began = facts(), time.time()
    machine = Machine(device, copy_bandwidth(device), product_rate(device))
    print(f"{name}: copy {machine.bandwidth / 1e12:.2f} TB/s, product {machine.product_rate / 1e12:.0f} TFLOP/s")
    print(" ".join(HEADER))
    rows = []
    for row in results(given.shapes, list(given.tokens), machine):
        rows.append(row)
        print(" ".join(line(row)), flush=True)
    if device.type != "cuda":
        return
    rates = {"copy, bytes/s": machine.bandwidth, "product, operations/s": machine.product_rate}
    result = {
        "question": "kernels", **found, "seconds": round(time.time() - began, 1), "load_after": list(os.getloadavg()),
        "options": {"shapes": given.shapes, "tokens": list(given.tokens)}, "comparisons": {},
        "tables": {"Microseconds of one layer": [list(HEADER), *map(line, rows)]},
        "raw": {"shapes": {name: asdict(SHAPES[name]) for name in given.shapes}, "rates": rates, "rows": rows},
    }  # fmt: skip
    result["machine"]["gpu"] = name
    result["versions"]["triton"] = triton.__version__
    card = next((part for part in name.lower().split() if any(map(str.isdigit, part))), "gpu")
    (given.output / f"kernels_{card}_{found['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
