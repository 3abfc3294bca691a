"""What more of everything costs in one process: adapters in a batch, adapters on the device, tokens in a prompt.

    python -m benchmarks.one_process.growth [--rounds 6] [--only batch resident prompts]

batch      64 requests over 0, 1, 4, 16 and 64 different adapters.
resident   the same 32 requests of one adapter while it alone is on the device, and while 200 are. Each round loads the
           others, or takes them off, between two pairs of segments, so that both orders come equally often.
prompts    prefill of 32 to 1,800 tokens under one adapter, against the base.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.engine import BenchEngine, Segment
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, ratios, spread
from benchmarks.common.workload import assigned, routed, rows_of, shape_of, write

PARTS = ("batch", "resident", "prompts")
BATCH_REQUESTS = 64
PROMPTS = (32, 128, 512, 1800)
ALONE = "1 resident"


def measure_batch(
    engine: BenchEngine, adapters: list[int], counts: Sequence[int], rounds: int, steps: int, seed: int
) -> dict[str, list[Segment]]:
    """number of different adapters -> one segment for each round."""
    batches = {
        str(count): [None if n is None else adapters[n] for n in assigned(BATCH_REQUESTS, count)] for count in counts
    }
    found: dict[str, list[Segment]] = {name: [] for name in batches}
    for batch in batches.values():
        engine.decode(batch, 2)  # warm up
    for number, name in interleaved(list(batches), rounds, seed):
        found[name].append(engine.decode(batches[name], steps))
        print(f"round {number + 1}/{rounds}, {name} adapters: {found[name][-1].step_ms:.1f} ms a step", flush=True)
    return found


def measure_resident(
    engine: BenchEngine, asked: int, others: list[int], requests: int, rounds: int, steps: int
) -> dict[str, list[Segment]]:
    """Segments of one adapter while it alone is on the device, and while `others` are too; two of each a round."""
    many = f"{1 + len(others)} resident"
    found: dict[str, list[Segment]] = {ALONE: [], many: []}
    engine.remove(others)
    for number in range(rounds):
        for name in (ALONE, many, many, ALONE):
            if name == many and len(found[many]) == 2 * number:
                engine.put_back(others)
            if name == ALONE and len(found[ALONE]) == 2 * number + 1:
                engine.remove(others)
            found[name].append(engine.decode([asked] * requests, steps))
            print(f"round {number + 1}/{rounds}, {name}: {found[name][-1].step_ms:.1f} ms a step", flush=True)
    engine.put_back(others)
    return found


def measure_prompts(
    engine: BenchEngine, adapter: int, lengths: Sequence[int], rounds: int, seed: int
) -> dict[int, dict[str, list[float]]]:
    """prompt's tokens -> base or adapter -> seconds to the first token, for each round."""
    found: dict[int, dict[str, list[float]]] = {}
    numbers: dict[str, int | None] = {"base": None, "1 adapter": adapter}
    for tokens in lengths:
        found[tokens] = {name: [] for name in numbers}
        repeats = max(1, 512 // tokens)
        for number in numbers.values():
            engine.prefill(number, tokens)  # warm up
        for _, name in interleaved(list(numbers), rounds, seed):
            seconds = [engine.prefill(numbers[name], tokens) for _ in range(repeats)]
            found[tokens][name].append(statistics.median(seconds))
    return found


def tell_batch(report: Report, found: dict[str, list[Segment]]) -> None:
    step_ms = {name: [each.step_ms for each in segments] for name, segments in found.items()}
    speeds = ratios(step_ms, "0", inverted=True)
    rows: list[list[str]] = []
    for name, segments in found.items():
        row = [name, spread([each.tokens_per_second for each in segments]).shown(1), spread(step_ms[name]).shown(0)]
        if name in speeds:
            ratio = report.compare(f"batch, {BATCH_REQUESTS} requests, {name} adapters / base", speeds[name])
            row += [ratio.shown(3), ratio.interval()]
        else:
            row += ["1", ""]
        rows.append(row)
    header = ("different adapters", "decode tok/s", "ms a step", "/ base, median (range)", "95 % of the median")
    report.table(f"{BATCH_REQUESTS} requests in a batch", header, rows)
    report.raw["batch"] = {name: [each.as_json() for each in segments] for name, segments in found.items()}


def tell_resident(report: Report, found: dict[str, list[Segment]], requests: int) -> None:
    step_ms = {name: [each.step_ms for each in segments] for name, segments in found.items()}
    many = next(name for name in found if name != ALONE)
    ratio = report.compare(f"{many} / {ALONE}", ratios(step_ms, ALONE, inverted=True)[many])
    rows = [
        [name, spread(values).shown(1), *((ratio.shown(3), ratio.interval()) if name == many else ("1", ""))]
        for name, values in step_ms.items()
    ]
    header = ("on the device", "ms a step", f"/ {ALONE}, median (range)", "95 % of the median")
    report.table(f"{requests} requests of one adapter", header, rows)
    report.raw["resident"] = {name: [each.as_json() for each in segments] for name, segments in found.items()}


def tell_prompts(report: Report, found: dict[int, dict[str, list[float]]]) -> None:
    rows: list[list[str]] = []
    for tokens, seconds in found.items():
        values = ratios(seconds, "base", inverted=True)["1 adapter"]
        ratio = report.compare(f"prompt of {tokens} tokens, 1 adapter / base", values)
        times = [spread([1000 * value for value in seconds[name]]).shown(1) for name in ("base", "1 adapter")]
        rows.append([str(tokens), *times, ratio.shown(3), ratio.interval()])
    header = ("tokens", "base, ms to first token", "1 adapter, ms", "prefill / base", "95 % of the median")
    report.table("Prefill by length of the prompt, one request", header, rows)
    report.raw["prompts_s"] = found


def main() -> None:
    made = parser(__doc__, rounds=6)
    made.add_argument("--steps", type=int, default=16, help="timed decode steps of a segment")
    made.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    made.add_argument("--resident", type=int, default=200, help="adapters on the device")
    options = made.parse_args()
    base = base_of(options)
    rounds, steps = (1, 2) if options.quick else (options.rounds, options.steps)
    in_batch = (0, 1, 4) if options.quick else (0, 1, 4, 16, 64)
    lengths = (32, 128) if options.quick else PROMPTS
    most = max(in_batch[-1], 5 if options.quick else options.resident if "resident" in options.only else 1)
    report = Report("growth", options)
    with tempfile.TemporaryDirectory() as name:
        engine = BenchEngine.start(base, most * rows_of(shape_of(base), routed()))
        adapters = engine.load(write(Path(name), engine.base, most, routed()))
        if "batch" in options.only:
            tell_batch(report, measure_batch(engine, adapters, in_batch, rounds, steps, options.seed))
        if "prompts" in options.only:
            tell_prompts(report, measure_prompts(engine, adapters[0], lengths, rounds, options.seed))
        if "resident" in options.only:
            requests = 32
            found = measure_resident(engine, adapters[0], adapters[1:], requests, max(1, rounds // 2), steps)
            tell_resident(report, found, requests)
    report.write()


if __name__ == "__main__":
    main()
