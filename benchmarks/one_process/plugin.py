"""What the plugin costs requests of the base: an engine with it against one in whose process it is absent.

    python -m benchmarks.one_process.plugin [--starts 3] [--rounds 6] [--steps 24]

Two engines in processes of their own, both alive, asked in turns: one set up as `perft serve` does, one plain vLLM with
VLLM_PLUGINS empty. A start can land well or badly in memory, so both are started several times, in alternating order;
the interval is over all rounds of all starts, and the median of each start is shown too.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common.engine import Segment
from benchmarks.common.remote import RemoteEngine, remote_engine
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, ratios, spread
from benchmarks.common.workload import routed, rows_of, shape_of

ON, ABSENT = "plugin on", "plugin absent"
REQUESTS = (1, 32)


def start(stack: ExitStack, base: Path, side: str) -> RemoteEngine:
    rows = 8 * rows_of(shape_of(base), routed())
    if side == ON:
        return stack.enter_context(remote_engine(base, rows))
    return stack.enter_context(remote_engine(base, None, environment={"VLLM_PLUGINS": ""}))


class Decoder(Protocol):
    """What is asked of either engine."""

    def decode(self, adapters: Sequence[int | None], steps: int) -> Segment: ...


def measure(engines: Mapping[str, Decoder], rounds: int, steps: int, seed: int) -> dict[int, dict[str, list[Segment]]]:
    """One start of both sides: requests -> side -> one segment for each round."""
    found: dict[int, dict[str, list[Segment]]] = {}
    for requests in REQUESTS:
        found[requests] = {side: [] for side in engines}
        for engine in engines.values():
            engine.decode([None] * requests, 4)  # warm up
        for _, side in interleaved(list(engines), rounds, seed):
            found[requests][side].append(engines[side].decode([None] * requests, steps))
        print(f"{_batch(requests)}: {_medians(found[requests])}", flush=True)
    return found


def tell(report: Report, found: list[dict[int, dict[str, list[Segment]]]]) -> None:
    rows: list[list[str]] = []
    for requests in REQUESTS:
        by_start: list[list[float]] = []
        for one in found:
            step_ms = {side: [each.step_ms for each in segments] for side, segments in one[requests].items()}
            by_start.append(ratios(step_ms, ABSENT, inverted=True)[ON])
        ratio = report.compare(f"{_batch(requests)}, {ON} / {ABSENT}", [value for own in by_start for value in own])
        step = spread([each.step_ms for one in found for each in one[requests][ABSENT]])
        starts = ", ".join(f"{statistics.median(own):.3f}" for own in by_start)
        rows.append([str(requests), step.shown(1), ratio.shown(3), ratio.interval(), starts])
    header = (
        "base requests", f"ms a step, {ABSENT}", f"{ON} / {ABSENT}, median (range)", "95 % of the median",
        "median of each start",
    )  # fmt: skip
    report.table("Base requests with and without the plugin", header, rows)
    report.raw["starts"] = [_as_json(one) for one in found]


def _batch(requests: int) -> str:
    return "1 request" if requests == 1 else f"{requests} requests"


def _medians(segments: dict[str, list[Segment]]) -> str:
    return ", ".join(f"{side} {statistics.median(e.step_ms for e in own):.1f} ms" for side, own in segments.items())


def _as_json(one: dict[int, dict[str, list[Segment]]]) -> dict[str, Any]:
    return {
        _batch(requests): {side: [each.as_json() for each in own] for side, own in by_side.items()}
        for requests, by_side in one.items()
    }


def main() -> None:
    made = parser(__doc__, rounds=6)
    made.add_argument("--starts", type=int, default=3)
    made.add_argument("--steps", type=int, default=24, help="timed decode steps of a segment")
    options = made.parse_args()
    base = base_of(options)
    starts, rounds, steps = (1, 1, 2) if options.quick else (options.starts, options.rounds, options.steps)
    report = Report("plugin", options)
    found: list[dict[int, dict[str, list[Segment]]]] = []
    for number in range(starts):
        with ExitStack() as stack:
            order = (ON, ABSENT) if number % 2 == 0 else (ABSENT, ON)
            print(f"start {number + 1}/{starts}", flush=True)
            found.append(
                measure({side: start(stack, base, side) for side in order}, rounds, steps, options.seed + number)
            )
    tell(report, found)
    report.write()


if __name__ == "__main__":
    main()
