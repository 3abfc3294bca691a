"""How a fleet fares by the way replicas are chosen, simulated in virtual time; the router's own code chooses in it.

    python -m benchmarks.routing [--rounds 5] [--only kill flood]

A round is a seed. Load times are those of benchmarks/results and of a fetch from the log store, measured first.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from os import cpu_count
from statistics import median

from benchmarks.common.report import Report, parser
from benchmarks.common.rounds import spread
from benchmarks.routing.machine import Machine, demo, gpu, measure_fetch
from benchmarks.routing.policies import HAPROXY, LLM_D, OLD_LOADS, ONE_HOME, OURS, POLICIES, RAY_BOUNDED, TWO_CHOICES
from benchmarks.routing.simulate import SCARCE, TIGHT, Scenario, run

SCENARIOS = {
    "kill": ("100 replicas, 5,000 adapters, one killed", Scenario("kill")),
    "add": ("The same fleet, one added", Scenario("add")),
    "midnight, part": ("The same fleet, 30 % of the ranking permuted", Scenario("shift", 0.3)),
    "midnight": ("The same fleet, the whole ranking permuted", Scenario("shift", 1.0)),
    "flood": ("The same fleet, 30 % of all requests for one adapter that was unpopular", Scenario("flood", 0.3)),
    "bursts": ("The same fleet, 200 requests at once for one adapter, every 5 s", Scenario("bursts", 0.3)),
    "tight": ("A tight pool (32 on the device, 200 on the host), one killed", Scenario("kill", room=TIGHT)),
    "scarce": (
        "A small cache too (16 on the device, 40 on the host, 60 on the disk), one killed",
        Scenario("kill", room=SCARCE),
    ),
    "old loads": ("The fleet of 100, one killed, by what the router knows", Scenario("kill")),
    "demo": (
        "The demo on CPUs, 4 replicas, 400 adapters, 30 % of the seats busy, one killed",
        Scenario("kill", replicas=4, adapters=400, load=0.3, warm_s=300, before_s=300, after_s=600),
    ),
    "large": (
        "1,000 replicas, 100,000 adapters, ten killed",
        Scenario("kill", replicas=1000, adapters=100_000, warm_s=10, before_s=10, after_s=15),
    ),
}
MAIN = (TWO_CHOICES, RAY_BOUNDED, LLM_D, HAPROXY, ONE_HOME, OURS)
CHOSEN = {"kill": tuple(POLICIES), "large": (TWO_CHOICES, LLM_D, HAPROXY, OURS), "old loads": tuple(OLD_LOADS)}
"""Which policies run, where it is not MAIN."""
TINY = Scenario("kill", replicas=3, adapters=20, warm_s=5, before_s=10, after_s=10, history=50)
COLUMNS = {
    "hits": ("device hits", 100, 1, " %"), "fetches": ("store fetches/s", 1, 1, ""),
    "p50": ("p50 TTFT, s", 1, 3, ""), "p99": ("p99", 1, 2, ""), "p99.9": ("p99.9", 1, 2, ""),
    "max/mean": ("max/mean load", 1, 2, ""), "moved": ("adapters loaded anew", 1, 0, ""),
    "recovery": ("s to recover", 1, 0, ""),
}  # fmt: skip
"""Metric -> its heading, factor, digits and unit."""
Runs = dict[str, list[dict[str, float]]]
"""Policy -> the figures of each seed."""


def simulate(name: str, machine: Machine, seeds: int, pool: Executor, scenario: Scenario) -> Runs:
    """Every policy with every seed."""
    policies = CHOSEN.get(name, MAIN)
    jobs = {(policy, seed): pool.submit(run, scenario, machine, policy, seed) for policy in policies
            for seed in range(seeds)}  # fmt: skip
    return {policy: [jobs[policy, seed].result() for seed in range(seeds)] for policy in policies}


def tell(report: Report, name: str, title: str, runs: Runs) -> None:
    """A table, and the last policy against each of the others, seed by seed."""
    rows = [[policy, *(cell(metric, [each[metric] for each in found]) for metric in COLUMNS)]
            for policy, found in runs.items()]  # fmt: skip
    report.table(title, ("policy", *(heading for heading, _, _, _ in COLUMNS.values())), rows)
    report.raw[name] = runs
    own, *others = reversed(runs)
    for policy in others:
        ratios = [ours["p99"] / other["p99"] for ours, other in zip(runs[own], runs[policy], strict=True)]
        report.compare(f"{name}: p99 TTFT, {own} / {policy}", ratios)


def cell(metric: str, values: Sequence[float]) -> str:
    """The median over the seeds and its 95 % interval, or one number if they do not differ as shown."""
    _, factor, digits, unit = COLUMNS[metric]
    found = spread([factor * value for value in values])
    median_, low, high = (f"{value:.{digits}f}" for value in (found.median, found.interval_low, found.interval_high))
    return median_ + unit if low == high else f"{median_}{unit} ({low} to {high})"


def tell_machines(report: Report, machines: dict[str, Machine], fetches: dict[str, list[float]]) -> None:
    report.raw["machines"] = {name: asdict(machine) for name, machine in machines.items()}
    report.raw["fetch_s"] = fetches
    rows = [
        [name, f"{m.seats}", f"{1e3 * m.step(1):.1f} to {1e3 * m.step(m.seats):.1f}",
         f"{m.prompt_tokens} in {1e3 * m.prefill(m.prompt_tokens):.0f} ms", f"{m.answer_tokens}",
         f"{1e3 * m.fetch_s:.0f}", f"{1e3 * m.read_s:.1f}", f"{1e3 * m.place_s:.1f}"]
        for name, m in machines.items()
    ]  # fmt: skip
    header = ("replica", "seats", "ms a step, 1 to all running", "prompt, mean", "answer, mean tokens",
              "store to disk, ms", "disk to host, ms", "host to device, ms")  # fmt: skip
    report.table("What is simulated", header, rows)


def tell_times(report: Report, runs: dict[str, Runs]) -> None:
    rows = []
    for name, found in runs.items():
        each = [figures for policy in found.values() for figures in policy]
        ours = [1e6 * figures["wall_s"] / figures["requests"] for figures in next(reversed(found.values()))]
        rows.append([name, f"{len(each)}", f"{median(f['requests'] for f in each):,.0f}",
                     f"{median(f['wall_s'] for f in each):.1f}", f"{median(ours):.0f}"])  # fmt: skip
    report.table(
        "What the simulation took", ("scenario", "runs", "requests a run", "s a run", "us a request, last policy"), rows
    )


def main() -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="scenarios")
    options = made.parse_args()
    report = Report("routing", options)
    seeds, fetch_rounds = (2, 1) if options.quick else (options.rounds, 12)
    fetches = {"demo": measure_fetch(16, fetch_rounds), "gpu": measure_fetch(64, fetch_rounds)}
    machines = {
        "demo, 2 cores, 9.1 MB (measured)": demo(median(fetches["demo"])),
        "GPU, 35.7 MB (disk to host and host to device measured on the CPU, the rest assumed)":
            gpu(median(fetches["gpu"])),
    }  # fmt: skip
    tell_machines(report, machines, fetches)
    small, big = machines.values()
    done: dict[str, Runs] = {}
    with ProcessPoolExecutor(cpu_count(), get_context("spawn")) as pool:
        for name in options.only:
            title, scenario = SCENARIOS[name]
            scenario = TINY if options.quick else scenario
            done[name] = simulate(name, small if name == "demo" else big, seeds, pool, scenario)
            tell(report, name, title, done[name])
            report.write()
    tell_times(report, done)
    report.write()


if __name__ == "__main__":
    main()
