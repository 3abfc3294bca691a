"""What adapters cost in one process: decode and prefill apart, by how many, of which kind, how popular.

    python -m benchmarks.one_process.adapters [--rounds 10] [--steps 24] [--only QUESTION ...]

One engine, stepped by hand. A segment is one batch decoded for some steps; in every round each configuration of a
question has one segment, in shuffled order, and its ratio is to the base's segment of that round. One factor changes at
a time; the centre is 32 requests over 8 adapters, R, M 4, K 2, bottleneck 16, uniform.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.common.engine import BenchEngine, Segment
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import ratios, spread
from benchmarks.common.workload import assigned, rows_of, shape_of, shapes, write

CENTRE_REQUESTS, CENTRE_ADAPTERS = 32, 8
MOST_ADAPTERS = 32
PREFILL_TOKENS = 1800


@dataclass(frozen=True)
class Configuration:
    """One kind of batch. adapters: how many different ones (0: all requests are the base's)."""

    name: str
    requests: int = CENTRE_REQUESTS
    adapters: int = CENTRE_ADAPTERS
    kind: str = "R"
    popularity: str = "uniform"


@dataclass(frozen=True)
class Question:
    """Configurations that are compared with each other; the first is the base. share: of the rounds asked for."""

    name: str
    configurations: tuple[Configuration, ...]
    share: float = 1.0


def _number(adapters: int) -> str:
    return "1 adapter" if adapters == 1 else f"{adapters} adapters"


def _with_base(
    name: str, *configurations: Configuration, requests: int = CENTRE_REQUESTS, share: float = 1.0
) -> Question:
    return Question(name, (Configuration("base", requests, 0), *configurations), share)


def _of_kinds(name: str, **kinds: str) -> Question:
    return _with_base(name, *(Configuration(label, kind=kind) for label, kind in kinds.items()), share=0.5)


AGAIN = Configuration("base again", adapters=0)
"""What the method itself finds between two equal batches."""

QUESTIONS: tuple[Question, ...] = (
    _with_base("1 request", Configuration(_number(1), 1, 1), requests=1),
    _with_base("8 requests", *(Configuration(_number(n), 8, n) for n in (1, 8)), requests=8),
    _with_base("32 requests", AGAIN, *(Configuration(_number(n), 32, n) for n in (1, 8, 32))),
    _of_kinds("variant", R="R", E="E", D="D", S="S"),
    _of_kinds("bottleneck", **{"4": "R, bottleneck 4", "16": "R", "64": "R, bottleneck 64"}),
    _of_kinds("M/K", **{"4/1": "R, M 4, K 1", "4/2": "R", "8/2": "R, M 8, K 2", "16/4": "R, M 16, K 4"}),
    _with_base(
        "popularity",
        *(Configuration(each, popularity=each) for each in ("uniform", "zipf", "one hot")),
        share=0.5,
    ),
)


def load_kinds(engine: BenchEngine, folder: Path, kinds: Sequence[str]) -> dict[str, list[int]]:
    """Load what the configurations need: kind -> the numbers of its adapters."""
    known = shapes(engine.base)
    counts = {kind: MOST_ADAPTERS if kind == "R" else CENTRE_ADAPTERS for kind in kinds}
    return {
        kind: engine.load(write(folder / f"kind-{number}", engine.base, count, known[kind]))
        for number, (kind, count) in enumerate(counts.items())
    }


def run(engine: BenchEngine, configuration: Configuration, loaded: dict[str, list[int]], steps: int) -> Segment:
    numbers = assigned(configuration.requests, configuration.adapters, configuration.popularity)
    own = loaded[configuration.kind]
    return engine.decode([None if number is None else own[number] for number in numbers], steps)


def measure(
    engine: BenchEngine, loaded: dict[str, list[int]], questions: Sequence[Question], rounds: int, steps: int, seed: int
) -> dict[str, dict[str, list[Segment]]]:
    """question -> configuration -> one segment for each of the question's rounds."""
    found: dict[str, dict[str, list[Segment]]] = {
        question.name: {configuration.name: [] for configuration in question.configurations} for question in questions
    }
    random = Random(seed)
    for question in questions:
        for configuration in question.configurations:
            run(engine, configuration, loaded, 2)  # warm up
    for number in range(rounds):
        asked = [question for question in questions if number < max(1, round(rounds * question.share))]
        random.shuffle(asked)
        for question in asked:
            for configuration in random.sample(question.configurations, len(question.configurations)):
                found[question.name][configuration.name].append(run(engine, configuration, loaded, steps))
            medians = {name: f"{segments[-1].step_ms:.0f}" for name, segments in found[question.name].items()}
            print(f"round {number + 1}/{rounds}, {question.name}: ms a step {medians}", flush=True)
    return found


def measure_prefill(engine: BenchEngine, adapter: int, tokens: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of one prompt under the base and under one adapter, round by round."""
    found: dict[str, list[float]] = {"base": [], "1 adapter": []}
    random = Random(seed)
    numbers = {"base": None, "1 adapter": adapter}
    for number in (None, adapter):
        engine.prefill(number, tokens)
    for _ in range(rounds):
        for name in random.sample(list(numbers), len(numbers)):
            found[name].append(engine.prefill(numbers[name], tokens))
    return found


def tell(report: Report, found: dict[str, dict[str, list[Segment]]]) -> None:
    """Decode by question: throughput, inter-token latency, time to first token, ratios."""
    header = (
        "configuration", "tok/s, median (range)", "ms between tokens", "ms to first token",
        "decode / base, median (range)", "95 % of the median",
    )  # fmt: skip
    for question, by_configuration in found.items():
        step_ms = {name: [each.step_ms for each in segments] for name, segments in by_configuration.items()}
        speeds = ratios(step_ms, "base", inverted=True)
        rows: list[list[str]] = []
        for name, segments in by_configuration.items():
            first = statistics.median(1000 * value for each in segments for value in each.first_token_s)
            row = [name, spread([each.tokens_per_second for each in segments]).shown(1)]
            row += [spread(step_ms[name]).shown(0), f"{first:.0f}"]
            if name in speeds:
                ratio = report.compare(f"decode, {question}, {name} / base", speeds[name])
                row += [ratio.shown(3), ratio.interval()]
            else:
                row += ["1", ""]
            rows.append(row)
        report.table(f"Decode, by {question}" if " " not in question else f"Decode, {question}", header, rows)
    report.raw["decode"] = {
        question: {name: [each.as_json() for each in segments] for name, segments in by_configuration.items()}
        for question, by_configuration in found.items()
    }


def tell_prefill(report: Report, found: dict[str, list[float]], tokens: int) -> None:
    ratio = report.compare(
        f"prefill, {tokens} tokens, 1 adapter / base", ratios(found, "base", inverted=True)["1 adapter"]
    )
    rows = [
        [name, spread([tokens / value for value in values]).shown(0), spread([1000 * v for v in values]).shown(0),
         *(("1", "") if name == "base" else (ratio.shown(3), ratio.interval()))]
        for name, values in found.items()
    ]  # fmt: skip
    header = ("configuration", "tok/s", "ms to first token", "prefill / base, median (range)", "95 % of the median")
    report.table(f"Prefill of {tokens} tokens, one request", header, rows)
    report.raw["prefill_s"] = {str(tokens): found}


def main() -> None:
    made = parser(__doc__, rounds=10)
    made.add_argument("--steps", type=int, default=24, help="timed decode steps of a segment")
    made.add_argument("--only", nargs="*", default=[], help=f"questions out of {[q.name for q in QUESTIONS]}, prefill")
    options = made.parse_args()
    base = base_of(options)
    questions = [question for question in QUESTIONS if not options.only or question.name in options.only]
    rounds, steps, tokens = (1, 2, 200) if options.quick else (options.rounds, options.steps, PREFILL_TOKENS)
    kinds = list(dict.fromkeys(["R", *(c.kind for q in questions for c in q.configurations)]))
    report = Report("adapters", options)
    with tempfile.TemporaryDirectory() as name:
        engine = BenchEngine.start(base, pool_rows_of(base, kinds))
        loaded = load_kinds(engine, Path(name), kinds)
    if questions:
        tell(report, measure(engine, loaded, questions, rounds, steps, options.seed))
    if not options.only or "prefill" in options.only:
        tell_prefill(report, measure_prefill(engine, loaded["R"][0], tokens, rounds, options.seed), tokens)
    report.write()


def pool_rows_of(base: Path, kinds: Sequence[str]) -> int:
    """Rows that all adapters of these kinds take together."""
    shape = shape_of(base)
    known = shapes(shape)
    return sum(rows_of(shape, known[kind]) * (MOST_ADAPTERS if kind == "R" else CENTRE_ADAPTERS) for kind in kinds)


if __name__ == "__main__":
    main()
