"""How long do the Triton kernels take for one layer, beside the time that their memory traffic alone would take?

    python benchmarks/kernels.py --output benchmarks/results       # on a GPU, without vLLM; about five minutes
    TRITON_INTERPRET=1 python benchmarks/kernels.py --shapes tiny  # under Triton's interpreter: only that it runs

For each shape, variant, number of tokens and of different adapters: route, shrink and expand of one layer, each alone
and all together, from a CUDA graph over so many layers that their rows do not stay in the cache. The floor is the bytes
that must be read and written once (rows of selected experts, routers, x, the output) over the bandwidth of a copy,
measured here. Weights are random: timing asks for nothing else, and tests hold the results to the reference.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from perft.config import AdapterConfig
from perft.operator.base import Batch, PlacedAdapter, TokenGroup
from perft.operator.gpu.backend import TritonOperator
from perft.operator.tables import PAGE_ROWS, SlotTables, pool_rows

LAYERS = 8
"""At least so many layers a measurement, and more until they read CACHE_BYTES."""
CACHE_BYTES = 2**27
REPEATS = 30
DTYPE = torch.bfloat16
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Shape:
    """A base: D, N, J."""

    hidden_size: int
    base_experts: int
    base_top_k: int


SHAPES = {
    "OLMoE": Shape(2048, 64, 8),
    "Mixtral-8x7B": Shape(4096, 8, 2),
    "Qwen3-30B-A3B": Shape(2048, 128, 8),
    "tiny": Shape(48, 4, 2),
}
TOKENS = (1, 8, 32, 128, 256, 512, 2048, 8192)
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
            width=max(128, self.config.num_experts * 16), max_experts=16,
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
        used = sum(int((operator.weights_PX[a:b] != 0).any(0).sum()) for a, b in itertools.pairwise(bounds))
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
    source = torch.empty(COPY_BYTES if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def results(names: list[str], tokens: list[int], device: torch.device) -> Iterator[dict[str, Any]]:
    bandwidth = copy_bandwidth(device)
    yield {"bandwidth": bandwidth}
    for name, variant, adapters in itertools.product(names, ("R", "E"), ADAPTERS):
        bench = Bench(SHAPES[name], variant, adapters, max(tokens), device)
        for count in (count for count in tokens if count >= adapters):
            yield {"shape": name, "variant": variant, **bench.measure(count, adapters, bandwidth)}
        del bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, help="folder for the JSON file (left out: only the table is printed)")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    print(f"{'shape':>14} var tokens adapters    all  route shrink expand  floor us/layer  all/floor  ({machine})")
    rows = []
    for row in results(given.shapes, list(given.tokens), device):
        rows.append(row)
        if "shape" in row:
            parts = " ".join(f"{row[part]:6.1f}" for part in ("all", "route", "shrink", "expand", "floor"))
            print(f"{row['shape']:>14} {row['variant']:>3} {row['tokens']:6} {row['adapters']:8} {parts}", end="")
            print(f"           {row['all'] / row['floor']:9.1f}", flush=True)
        else:
            print(f"copy: {row['bandwidth'] / 1e12:.2f} TB/s")
    if given.output:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        date = time.strftime("%Y-%m-%d", time.gmtime())
        facts = {
            "command": sys.argv,
            "commit": commit,
            "torch": torch.__version__,
            "machine": machine,
        }
        shapes = {name: asdict(SHAPES[name]) for name in given.shapes}
        (given.output / f"kernels_gpu_{date}.json").write_text(
            json.dumps(facts | {"shapes": shapes, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
