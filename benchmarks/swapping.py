"""The effect of swapping adapters on running streams: their inter-token latency, on the demo base.

One server, a pool that is always full. Streams run without a break through interleaved phases (alone, asked, swapped,
alone, ...), because machines drift: compare ratios within a round.

    alone    only the streams
    asked    plus one short request per second, for an adapter that is on the device
    swapped  plus one upload per second of a new version, activated, and a short request for it (it evicts another)

    python benchmarks/swapping.py [--rounds 5] [--seconds 16] [--streams 8] [--output FILE]
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.report import facts as machine
from benchmarks.served import Client, adapters, calm, demo_base, percentile, serving, shape_of, write
from server.demo.__main__ import BASE_NAME

PHASES = ("alone", "asked", "swapped")
STREAMED, SPARE = 3, 3
"""Adapters that streams use, and further ones that the pool has room for."""
SETTLE_S = 1.0
STREAM_TOKENS = 1900


class Streams:
    """Streams in threads, repeated until `end`; `gaps` holds (perf_counter seconds, seconds since the last token)."""

    def __init__(self, client: Client, models: list[str]) -> None:
        self.gaps: list[tuple[float, float]] = []
        self.failures: list[BaseException] = []
        self._client, self._ended = client, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=pair, daemon=True) for pair in enumerate(models)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, model: str) -> None:
        try:
            while not self._ended.is_set():
                last = None
                for now in self._client.stream(model, [1 + (7 * number + j) % 4000 for j in range(24)], STREAM_TOKENS):
                    if last is not None:
                        self.gaps.append((now, now - last))
                    last = now
                    if self._ended.is_set():
                        return
        except BaseException as error:
            self.failures.append(error)

    def between(self, start: float, end: float) -> list[float]:
        return [gap for when, gap in list(self.gaps) if start <= when < end]

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def every_second(work: Callable[[], None], seconds: float) -> list[float]:
    """Start `work` once a second for `seconds`, whether or not the last has ended; the seconds that each took."""

    def timed(tick: int) -> float:
        time.sleep(max(0.0, start + tick - time.perf_counter()))
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    start = time.perf_counter()
    with ThreadPoolExecutor(int(seconds)) as threads:
        took = list(threads.map(timed, range(int(seconds))))
    time.sleep(max(0.0, start + seconds - time.perf_counter()))
    return took


def measure(client: Client, folders: list[Path], streams: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Gaps in milliseconds by phase and round, and the seconds that a request, or an upload with its request, took."""
    names = [f"streamed-{number}" for number in range(STREAMED)]
    for name in [*names, "asked", "swapped"]:
        client.upload(name, folders.pop())
    uploaded = iter(folders)

    def ask(name: str) -> None:
        for _ in client.stream(name, [5, 6, 7, 8], 4):
            pass

    def swap() -> None:
        client.upload("swapped", next(uploaded))
        ask("swapped")

    work = {"alone": lambda: None, "asked": lambda: ask("asked"), "swapped": swap}
    running = Streams(client, [[BASE_NAME, *names][number % (1 + STREAMED)] for number in range(streams)])
    gaps: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}
    took: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        every_second(work[phase], 4)  # warm up
    for number in range(rounds):
        for phase in PHASES:
            start = time.perf_counter()
            took[phase] += every_second(work[phase], seconds)
            gaps[phase].append([1000 * gap for gap in running.between(start + SETTLE_S, time.perf_counter())])
            p50, p99 = (percentile(gaps[phase][-1], share) for share in (0.5, 0.99))
            print(f"round {number + 1}, {phase}: p50 {p50:.0f} ms, p99 {p99:.0f} ms", flush=True)
    running.end()
    return {"gaps": gaps, "took": took}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Median and range over the rounds of p50 and p99, and of their ratios to the other phases of the same round."""
    gaps = found["gaps"]
    result: dict[str, Any] = {}
    for share in (0.5, 0.99):
        by_phase = {phase: [percentile(each, share) for each in gaps[phase]] for phase in PHASES}
        named = f"p{100 * share:.0f}"
        result |= {f"{phase}, {named} ms": spread(values) for phase, values in by_phase.items()}
        for other in ("alone", "asked"):
            ratios = [mine / theirs for mine, theirs in zip(by_phase["swapped"], by_phase[other], strict=True)]
            result[f"swapped / {other}, {named}"] = spread(ratios)
        pooled = {phase: percentile([gap for each in gaps[phase] for gap in each], share) for phase in PHASES}
        result[f"all rounds together, {named} ms"] = {phase: round(value, 1) for phase, value in pooled.items()}
    result["upload, activation and request, s"] = spread(found["took"]["swapped"])
    result["request, s"] = spread(found["took"]["asked"])
    return result


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, 3), "lowest": round(low, 3), "highest": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=16)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the result there, as JSON")
    options = parser.parse_args()
    before = calm()
    print(before, flush=True)
    base = demo_base()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = STREAMED + 2 + 5 + int(options.seconds + 1) * options.rounds
        folders = adapters(folder, shape_of(base), count)
        with serving(base, folder / "server", STREAMED + SPARE) as server:
            client = Client(server)
            found = measure(client, folders, options.streams, options.rounds, options.seconds)
            counters = {
                name: client.metric(name) for name in ("perft_step_load_bytes_total", "perft_adapter_evictions_total")
            }
    results = {"summary": summary(found), "counters": counters, "rounds": by_round(found["gaps"])}
    write(options.output, "swapping", machine() | {"streams": options.streams, "busy": before}, results)


def by_round(gaps: dict[str, list[list[float]]]) -> dict[str, list[dict[str, float]]]:
    return {
        phase: [
            {"gaps": len(each), "p50 ms": round(percentile(each, 0.5), 1), "p99 ms": round(percentile(each, 0.99), 1)}
            for each in rounds
        ]
        for phase, rounds in gaps.items()
    }


if __name__ == "__main__":
    main()
