"""What moving an adapter costs: disk to host, host to device, off the device, by size, idle and beside decoding.

    python -m benchmarks.one_process.swap [--rounds 8]

The same orders as the server's go to the worker in this process. Beside decoding, steps of 16 base requests go on until
the move has ended; the longest step is compared with the median of steps without a move in the same round.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.format.folder import read_folder
from adapters.ref import AdapterRef
from benchmarks.common.engine import BenchEngine
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import spread
from benchmarks.common.workload import routed, rows_of, shape_of, write

BOTTLENECKS = (4, 16, 64)
REQUESTS = 16
MOVES = ("prepare", "place")
NAMES = {"prepare": "disk to host", "place": "host to device", "evict": "off the device"}


@dataclass
class Moved:
    """Seconds of each move; and beside decoding, the longest step of a move over the median step without one."""

    bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    gaps: dict[str, list[float]] = field(default_factory=dict)


def loading_of(engine: BenchEngine) -> Any:
    """The worker's `OrderedLoading`."""
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager.ordered_loading


def move(loading: Any, name: str, adapter: AdapterRef, meanwhile: Callable[[], None]) -> float:
    """Order a move, and call `meanwhile` until it has ended; the seconds it took."""
    began = time.perf_counter()
    outcome = getattr(loading, name)(adapter)
    while outcome.state == "running":
        meanwhile()
        outcome = loading.outcome(name, adapter)
    if outcome.state != "done":
        raise RuntimeError(f"{name}: {outcome}")
    return time.perf_counter() - began


def measure(engine: BenchEngine, folders: dict[int, Path], rounds: int) -> dict[int, Moved]:
    """bottleneck -> what its moves cost. Each round moves every size in and out, idle, then beside decoding."""
    loading, found = loading_of(engine), {bottleneck: Moved() for bottleneck in folders}
    adapters: dict[int, AdapterRef] = {}
    for bottleneck, folder in folders.items():
        digest = read_folder(folder, engine.base).digest
        adapters[bottleneck] = AdapterRef(f"moved-{bottleneck}@1", 9000 + bottleneck, "PERFT", digest, folder)
        found[bottleneck].bytes = (folder / "adapter_model.safetensors").stat().st_size
    for _ in range(rounds):
        for bottleneck, adapter in adapters.items():
            seconds = found[bottleneck].seconds
            for name in MOVES:
                seconds.setdefault(name, []).append(move(loading, name, adapter, lambda: time.sleep(0.0005)))
            began = time.perf_counter()
            loading.evict(adapter.key)
            seconds.setdefault("evict", []).append(time.perf_counter() - began)
            loading.drop(adapter.key)
            for name, gap in beside_decoding(engine, loading, adapter).items():
                found[bottleneck].gaps.setdefault(name, []).append(gap)
    return found


def beside_decoding(engine: BenchEngine, loading: Any, adapter: AdapterRef) -> dict[str, float]:
    """The longest step during each move, over the median of the steps without one."""
    steps: list[float] = []
    longest: dict[str, float] = {}

    def step() -> None:
        began = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - began)

    with engine.requests([None] * REQUESTS):
        for _ in range(8):
            step()
        usual = statistics.median(steps)
        for name in MOVES:
            steps.clear()
            move(loading, name, adapter, step)
            longest[name] = max(steps, default=usual) / usual
    loading.evict(adapter.key)
    loading.drop(adapter.key)
    return longest


def tell(report: Report, found: dict[int, Moved]) -> None:
    rows: list[list[str]] = []
    for bottleneck, moved in found.items():
        for name, seconds in moved.seconds.items():
            gap = spread(moved.gaps[name]).shown(2) if name in moved.gaps else ""
            rows.append(
                [
                    f"{bottleneck}",
                    f"{moved.bytes / 1e6:.1f}",
                    NAMES[name],
                    spread([1e3 * s for s in seconds]).shown(2),
                    gap,
                ]
            )
    header = ("bottleneck", "MB", "move", "ms, median (range)", "longest step beside it / usual step")
    report.table("Moving an adapter (R, M 4) between the tiers", header, rows)
    report.raw["moves"] = {str(bottleneck): moved.__dict__ for bottleneck, moved in found.items()}


def main() -> None:
    options = parser(__doc__, rounds=8).parse_args()
    base = base_of(options)
    report = Report("swap", options)
    with tempfile.TemporaryDirectory() as name:
        sizes = BOTTLENECKS[:1] if options.quick else BOTTLENECKS
        kinds = {bottleneck: routed(bottleneck=bottleneck) for bottleneck in sizes}
        engine = BenchEngine.start(base, sum(rows_of(shape_of(base), kind) for kind in kinds.values()))
        folders = {b: write(Path(name) / str(b), engine.base, 1, kind)[0] for b, kind in kinds.items()}
        tell(report, measure(engine, folders, 1 if options.quick else options.rounds))
    report.write()


if __name__ == "__main__":
    main()
