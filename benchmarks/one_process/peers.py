"""Other ways to serve several adapters, on the same work, beside ours.

    python -m benchmarks.one_process.peers [--rounds 6] [--only lora hf processes] [--lora-rank RANK]

lora       vLLM's own LoRA on q and v, in our engine (`--lora-target-modules qkv_proj`), at the rank whose activated
           parameters equal those of R, M 4, K 2, bottleneck 16 (docs/method.md). vLLM pads ranks to its slot size.
hf         Hugging Face `generate`, one adapter at a time, its requests as one batch; 32 requests over 8 adapters.
processes  one engine for each adapter, two of them on two cores, one thread each; 32 requests over 2 adapters, against
           one engine that serves both on two threads. More processes than cores could only be slower.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common.engine import BenchEngine, Segment
from benchmarks.common.hugging_face import HuggingFacePeer
from benchmarks.common.peft_lora import activated_parameters, equal_rank, slot_rank, write_lora
from benchmarks.common.remote import remote_engine
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, measured, ratios, spread
from benchmarks.common.workload import assigned, routed, rows_of, shape_of, write

PARTS = ("lora", "hf", "processes")
REQUESTS, ADAPTERS = 32, 8
OURS = "PERFT"


def lora_options(rank: int) -> dict[str, Any]:
    """What an engine needs to serve PEFT LoRA on q and v beside PERFT."""
    return {
        "lora_target_modules": ["qkv_proj"],
        "max_lora_rank": slot_rank(rank),
        "max_loras": ADAPTERS,
        "max_cpu_loras": 4 * ADAPTERS,
    }


def compare_lora(
    report: Report, engine: BenchEngine, base: Path, folder: Path, rank: int, rounds: int, steps: int, seed: int
) -> None:
    """PERFT and vLLM's LoRA in one engine, started with `lora_options`: decode steps of the same batch."""
    shape = shape_of(base)
    own = engine.load(write(folder / "perft", shape, ADAPTERS, routed()))
    lora = engine.load([write_lora(folder / "lora" / str(n), base, shape, rank, n) for n in range(ADAPTERS)])
    label = f"vLLM LoRA, rank {rank}"
    batches: dict[str, list[int | None]] = {"base": [None] * REQUESTS}
    for name, loaded in ((OURS, own), (label, lora)):
        batches[name] = [None if n is None else loaded[n] for n in assigned(REQUESTS, ADAPTERS)]
    for batch in batches.values():
        engine.decode(batch, 4)  # warm up
    found: dict[str, list[Segment]] = {name: [] for name in batches}
    for number, name in interleaved(list(batches), rounds, seed):
        found[name].append(engine.decode(batches[name], steps))
        print(f"round {number + 1}/{rounds}, {name}: {found[name][-1].step_ms:.1f} ms a step", flush=True)
    step_ms = {name: [each.step_ms for each in segments] for name, segments in found.items()}
    against_base = ratios(step_ms, "base", inverted=True)
    ratio = report.compare("PERFT / vLLM LoRA, 8 adapters", ratios(step_ms, label, inverted=True)[OURS])
    rows = [
        [
            name,
            spread([each.tokens_per_second for each in found[name]]).shown(1),
            "1" if name == "base" else report.compare(f"{name} / base, beside LoRA", against_base[name]).shown(3),
            ratio.shown(3) if name == OURS else "",
        ]
        for name in found
    ]
    parameters = activated_parameters(shape, routed())
    title = f"{REQUESTS} requests over {ADAPTERS} adapters, {parameters:,} activated parameters a token"
    report.table(title, ("served as", "decode tok/s", "/ base", "PERFT / vLLM LoRA, decode"), rows)
    report.raw["lora"] = {name: [each.as_json() for each in segments] for name, segments in found.items()}
    report.raw["lora rank"] = {"rank": rank, "slot": slot_rank(rank), "activated parameters of PERFT": parameters}


def compare_hugging_face(
    report: Report,
    engine: BenchEngine,
    base: Path,
    folders: list[Path],
    own: list[int],
    rounds: int,
    tokens: int,
    seed: int,
) -> None:
    """Whole answers, prefill included: `own` are the numbers of the adapters in `folders`."""
    batch = [None if n is None else own[n] for n in assigned(REQUESTS, len(own))]
    peer = HuggingFacePeer(base, folders)
    peer.generate(len(own), 2)
    engine.generate(batch, 2)
    names = (OURS, "Hugging Face")
    work = {OURS: lambda: engine.generate(batch, tokens), names[1]: lambda: peer.generate(REQUESTS, tokens)}
    seconds = measured(names, rounds, lambda name: work[name](), seed, "s")
    ratio = report.compare("PERFT / Hugging Face", ratios(seconds, names[1], inverted=True)[OURS])
    speed = {name: spread([REQUESTS * tokens / value for value in values]) for name, values in seconds.items()}
    rows = [[name, speed[name].shown(1), ratio.shown(2) if name == OURS else "1"] for name in names]
    title = f"{REQUESTS} requests of {tokens} tokens over {len(own)} adapters, prefill included"
    report.table(title, ("served as", "tok/s", "PERFT / Hugging Face"), rows)
    report.raw["hf_s"] = seconds


def compare_processes(
    report: Report,
    base: Path,
    engine: BenchEngine,
    folders: list[Path],
    own: list[int],
    rounds: int,
    steps: int,
    seed: int,
) -> None:
    """Two engines of one adapter each, at work at the same time, against `engine`, which serves both adapters."""
    one, two = "one engine, 2 adapters", "2 engines, 1 adapter each"
    rows_each = rows_of(shape_of(base), routed())
    with ExitStack() as stack:
        thread = {"OMP_NUM_THREADS": "1"}
        engines = [
            stack.enter_context(remote_engine(base, rows_each, [folder], environment=thread)) for folder in folders
        ]

        def run(name: str) -> float:
            if name == one:
                return engine.decode([own[n % 2] for n in range(REQUESTS)], steps).tokens_per_second
            for each in engines:
                each.ask([0] * (REQUESTS // 2), steps)
            return sum(each.answer().tokens_per_second for each in engines)

        for name in (one, two):
            run(name)
        found = measured((one, two), rounds, run, seed, "tok/s")
    ratio = report.compare("one engine / one process for each adapter, 2 adapters", ratios(found, two)[one])
    rows = [[name, spread(values).shown(1), ratio.shown(3) if name == one else "1"] for name, values in found.items()]
    report.table(f"{REQUESTS} requests over 2 adapters", ("served by", "decode tok/s", "ratio"), rows)
    report.raw["processes_tokens_per_second"] = found


def main() -> None:
    made = parser(__doc__, rounds=6)
    made.add_argument("--steps", type=int, default=24, help="timed decode steps of a segment")
    made.add_argument("--tokens", type=int, default=24, help="of each request, against Hugging Face")
    made.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    made.add_argument("--lora-rank", type=int, help="(default: that of equal activated parameters)")
    options = made.parse_args()
    base = base_of(options)
    rounds, steps, tokens = (1, 2, 4) if options.quick else (options.rounds, options.steps, options.tokens)
    rank = options.lora_rank or equal_rank(base, shape_of(base), routed())
    report = Report("peers", options)
    shape, seed = shape_of(base), options.seed
    pool_rows = ADAPTERS * rows_of(shape, routed())
    with tempfile.TemporaryDirectory() as name:
        if "lora" in options.only:
            engine = BenchEngine.start(base, pool_rows, **lora_options(rank))
            compare_lora(report, engine, base, Path(name) / "lora", rank, rounds, steps, seed)
            engine.close()
        if {"hf", "processes"} & set(options.only):
            folders = write(Path(name) / "perft", shape, ADAPTERS, routed())
            engine = BenchEngine.start(base, pool_rows)
            own = engine.load(folders)
            if "hf" in options.only:
                compare_hugging_face(report, engine, base, folders, own, rounds, tokens, seed)
            if "processes" in options.only:
                compare_processes(report, base, engine, folders[:2], own[:2], rounds, steps, seed)
    report.write()


if __name__ == "__main__":
    main()
