"""What a busy neighbour costs: a process that computes without end, beside the engine.

    python -m benchmarks.one_process.neighbour [--rounds 10] [--steps 24]

One engine, 32 requests, of the base and over 8 adapters, alone and beside the neighbour; the four take turns. Asked:
do adapters lose more than the base does? The neighbour is not pinned: the system moves it between the cores.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.engine import BenchEngine, Segment
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, ratios, spread
from benchmarks.common.workload import assigned, routed, rows_of, shape_of, write

REQUESTS, ADAPTERS = 32, 8
ALONE, BESIDE = "alone", "beside a neighbour"
BUSY = "while True:\n    pass"
SETTLE_S = 0.5
"""How long the neighbour runs before the segment starts."""


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        process.kill()
        process.wait()


def measure(engine: BenchEngine, adapters: list[int], rounds: int, steps: int, seed: int) -> dict[str, list[Segment]]:
    """`base, alone` and so on -> one segment for each round."""
    batches: dict[str, list[int | None]] = {
        "base": [None] * REQUESTS,
        "adapters": [None if number is None else adapters[number] for number in assigned(REQUESTS, len(adapters))],
    }
    found: dict[str, list[Segment]] = {f"{name}, {place}": [] for name in batches for place in (ALONE, BESIDE)}
    for batch in batches.values():
        engine.decode(batch, 4)  # warm up
    for number, name in interleaved(list(found), rounds, seed):
        which, _, place = name.partition(", ")
        if place == ALONE:
            found[name].append(engine.decode(batches[which], steps))
        else:
            with neighbour():
                found[name].append(engine.decode(batches[which], steps))
        print(f"round {number + 1}/{rounds}, {name}: {found[name][-1].step_ms:.1f} ms a step", flush=True)
    return found


def tell(report: Report, found: dict[str, list[Segment]]) -> None:
    step_ms = {name: [each.step_ms for each in segments] for name, segments in found.items()}
    rows: list[list[str]] = []
    for place in (ALONE, BESIDE):
        own = {which: step_ms[f"{which}, {place}"] for which in ("base", "adapters")}
        ratio = report.compare(f"{place}, {ADAPTERS} adapters / base", ratios(own, "base", inverted=True)["adapters"])
        rows.append([place, *(spread(own[which]).shown(0) for which in own), ratio.shown(3), ratio.interval()])
    header = (
        "the engine is", "base, ms a step", f"{ADAPTERS} adapters, ms a step", "adapters / base, median (range)",
        "95 % of the median",
    )  # fmt: skip
    report.table(f"{REQUESTS} requests with and without one CPU-bound neighbour", header, rows)
    report.raw["segments"] = {name: [each.as_json() for each in segments] for name, segments in found.items()}


def main() -> None:
    made = parser(__doc__, rounds=10)
    made.add_argument("--steps", type=int, default=24, help="timed decode steps of a segment")
    options = made.parse_args()
    base = base_of(options)
    rounds, steps = (1, 2) if options.quick else (options.rounds, options.steps)
    report = Report("neighbour", options)
    with tempfile.TemporaryDirectory() as name:
        engine = BenchEngine.start(base, ADAPTERS * rows_of(shape_of(base), routed()))
        adapters = engine.load(write(Path(name), engine.base, ADAPTERS, routed()))
    tell(report, measure(engine, adapters, rounds, steps, options.seed))
    report.write()


if __name__ == "__main__":
    main()
