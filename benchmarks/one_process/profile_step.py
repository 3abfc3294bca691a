"""Where the time of one decode step goes, by part, for the base and for adapters, with each back end of the operator.

    python -m benchmarks.one_process.profile_step [--rounds 8] [--steps 24] [--back-ends torch numba]

32 requests over 8 adapters. The parts are functions with a timer around them, a few hundred calls a step; time counts
for the innermost timed function, so the parts add up to the step. Base and adapters take turns in one engine; each back
end has an engine of its own, one after the other.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.engine import BenchEngine
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved
from benchmarks.common.timers import Part, Timers
from benchmarks.common.workload import assigned, routed, rows_of, shape_of, write

REQUESTS, ADAPTERS = 32, 8
BASE, MIX = "base", f"{ADAPTERS} adapters"
REST = "rest of the engine"
WARM_UP_STEPS = 4

PARTS = (
    Part("scheduler", "vllm.v1.core.sched.scheduler:Scheduler.schedule"),
    Part("scheduler", "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"),
    Part("model runner", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model"),
    Part("model runner", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens"),
    Part("adapters: vLLM's mapping", "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras"),
    Part("adapters: known, loaded", "perft.engine.manager:AdapterManager.set_active_adapters"),
    Part("adapters: plan", "perft.engine.manager:AdapterManager._plan"),
    Part("model: norms, rotary, Python", "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward"),
    Part("model: linear products", "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply"),
    Part("model: attention", "vllm.model_executor.layers.attention.attention:Attention.forward"),
    Part("MoE layer: route, reduce", "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner.forward"),
    Part(
        "MoE layer: base experts", "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.forward_modular"
    ),
    Part("MoE layer: delta, begun", "perft.engine.moe_layer:LayerState.start"),
    Part("MoE layer: delta, added", "perft.engine.moe_layer:LayerState.add"),
    Part("logits", "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward"),
    Part("sampling", "vllm.v1.sample.sampler:Sampler.forward"),
    Part("outputs", "vllm.v1.engine.output_processor:OutputProcessor.process_outputs"),
)
BACK_ENDS = {
    "torch": Part("MoE layer: delta, back end", "perft.operator.torch_backend:TorchStep.start"),
    "numba": Part("MoE layer: delta, back end", "perft.operator.cpu.backend:NumbaStep.add"),
}
"""What computes the delta, apart from what the layer does around it."""

Profile = dict[str, float]
"""part -> milliseconds of one step."""


def measure(
    engine: BenchEngine, adapters: list[int], parts: Sequence[Part], rounds: int, steps: int, seed: int
) -> dict[str, list[Profile]]:
    """base and adapters -> one profile for each round."""
    batches: dict[str, list[int | None]] = {
        BASE: [None] * REQUESTS,
        MIX: [None if number is None else adapters[number] for number in assigned(REQUESTS, len(adapters))],
    }
    for batch in batches.values():
        engine.decode(batch, WARM_UP_STEPS)
    found: dict[str, list[Profile]] = {name: [] for name in batches}
    timers = Timers()
    with timers.around([Part(REST, "vllm.v1.engine.llm_engine:LLMEngine.step"), *parts]):
        for _, name in interleaved(list(batches), rounds, seed):
            kept: list[Profile] = found[name]
            keep = partial(_keep, kept, timers, steps)
            engine.decode(batches[name], steps, before=timers.reset, after=keep)
    return found


def _keep(kept: list[Profile], timers: Timers, steps: int) -> None:
    kept.append({part: 1000 * seconds / steps for part, seconds in timers.seconds.items()})


def tell(report: Report, found: dict[str, dict[str, list[Profile]]]) -> None:
    """Median milliseconds of a step by part: a column for the base and each back end, and what adapters add."""
    medians = {
        (back_end, name): {part: statistics.median(one.get(part, 0.0) for one in profiles) for part in _parts(profiles)}
        for back_end, by_name in found.items()
        for name, profiles in by_name.items()
    }
    totals = {
        (back_end, name): statistics.median(sum(one.values()) for one in profiles)
        for back_end, by_name in found.items()
        for name, profiles in by_name.items()
    }
    order = dict.fromkeys([*(part.name for part in (*PARTS, *BACK_ENDS.values())), REST])
    rows = [[part, *(f"{profile.get(part, 0.0):.2f}" for profile in medians.values())] for part in order]
    rows.append(["a step", *(f"{total:.2f}" for total in totals.values())])
    report.table(
        f"Milliseconds of a decode step, {REQUESTS} requests",
        ("part", *(f"{name} ({back_end})" for back_end, name in medians)),
        rows,
    )
    for back_end, by_name in found.items():
        pairs = zip(by_name[BASE], by_name[MIX], strict=True)
        report.compare(f"{back_end}, {MIX} / {BASE}", [sum(b.values()) / sum(m.values()) for b, m in pairs])
    report.raw["profiles_ms"] = {
        back_end: {
            name: [{part: round(ms, 3) for part, ms in one.items()} for one in profiles]
            for name, profiles in own.items()
        }
        for back_end, own in found.items()
    }


def _parts(profiles: Sequence[Profile]) -> list[str]:
    return list(dict.fromkeys(part for one in profiles for part in one))


def main() -> None:
    made = parser(__doc__, rounds=8)
    made.add_argument("--steps", type=int, default=24, help="decode steps of a segment")
    made.add_argument("--back-ends", nargs="*", choices=list(BACK_ENDS), default=list(BACK_ENDS))
    options = made.parse_args()
    base = base_of(options)
    rounds, steps = (1, 2) if options.quick else (options.rounds, options.steps)
    rows = ADAPTERS * rows_of(shape_of(base), routed())
    report = Report("profile_step", options)
    found: dict[str, dict[str, list[Profile]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = write(Path(name), shape_of(base), ADAPTERS, routed())
        for back_end in options.back_ends:
            perft = {"pool_rows": rows, "operator_backend": back_end}
            engine = BenchEngine.start(base, rows, additional_config={"perft": perft})
            parts = (*PARTS, BACK_ENDS[back_end])
            found[back_end] = measure(engine, engine.load(folders), parts, rounds, steps, options.seed)
            engine.close()
    tell(report, found)
    report.write()


if __name__ == "__main__":
    main()
