"""Owns what is compared: methods, budgets of activated parameters, learning rates, seeds, and the order of the runs.

Invariants: methods of one budget differ by at most 2 % in the parameters that a token activates; and a grid that was
stopped is still a fair comparison: a seed is run for all methods before the next one begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.inspection.figures import figures


@dataclass(frozen=True)
class Method:
    """experts, top_k: M and K of a PERFT variant; None for a baseline, and for what the variant itself decides."""

    label: str
    variant: str | None = None
    experts: int | None = None
    top_k: int | None = None


METHODS = {
    "qvlora": Method("qvLoRA"),
    "router-lora": Method("router LoRA"),
    "S": Method("S", "S", 1),
    "D2": Method("D, M = 2", "D", 2),
    "R1of4": Method("R, Top1/4", "R", 4, 1),
    "R2of4": Method("R, Top2/4", "R", 4, 2),
    "R2of8": Method("R, Top2/8", "R", 8, 2),
    "E": Method("E", "E"),
}
BASE = "base"
"""The base as it is, which is evaluated once for each task."""

LIKE_LORA = {"small": (4, 16), "larger": (4, 16), "demo": (4,)}
"""The budgets of each base: as many activated parameters as qvLoRA of this rank."""
LARGEST_DIFFERENCE = 0.02
LEARNING_RATES = (3e-2, 1e-2, 1e-1)
"""Tried first, in this order, each for all methods. Where the best is the lowest or the highest,
the next one beyond it is tried too."""
FURTHER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TUNING_SEED = 0


class Run(NamedTuple):
    """One training and its scores, or for the method `base` the scores alone. budget: the rank of the qvLoRA that
    activates as many parameters. longer: so many times as many steps as usual."""

    base: str
    task: str
    method: str
    budget: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    longer: int = 1

    @property
    def name(self) -> str:
        if self.method == BASE:
            return f"{self.base}-{self.task}-base"
        longer = f"-{self.longer}times" if self.longer > 1 else ""
        return f"{self.base}-{self.task}-{self.method}-{self.budget}-lr{self.learning_rate:g}-seed{self.seed}{longer}"


class Part(NamedTuple):
    """A part of the grid: these methods at one budget, for each of the seeds."""

    base: str
    task: str
    budget: int
    seeds: Sequence[int]
    methods: Sequence[str] = tuple(METHODS)
    longer: int = 1


LONGER, LONGER_METHODS, LONGER_BUDGET = 4, ("qvlora", "R2of4", "E"), 4
"""Whether more steps change what comes out."""
LARGER_METHODS = ("qvlora", "S", "R1of4", "R2of4", "E")
"""Whether a larger base, trained longer, changes it."""
ORDER = (
    Part("small", "arithmetic", 4, (0, 1, 2)),
    Part("small", "arithmetic", LONGER_BUDGET, (0,), LONGER_METHODS, LONGER),
    Part("small", "kinds", 4, (0, 1, 2)),
    Part("small", "arithmetic", 16, (0, 1, 2)),
    Part("small", "arithmetic", 4, (3, 4)),
    Part("small", "arithmetic", 16, (3, 4)),
    Part("small", "kinds", 4, (3, 4)),
    Part("small", "kinds", 16, (0, 1, 2, 3, 4)),
    Part("larger", "arithmetic", 4, (0, 1, 2, 3, 4), LARGER_METHODS),
    Part("larger", "arithmetic", 16, (0, 1, 2), LARGER_METHODS),
    Part("demo", "arithmetic", 4, (0, 1, 2), ("qvlora", "R2of4", "E")),
)


def planned(results: Mapping[str, Any], order: Sequence[Part] = ORDER) -> Iterator[Run]:
    """Every run in its order, as far as the results so far decide it: learning rates are chosen on the way.

    results: name of a run -> its result. The first run that has none is the one to do next.
    """
    for part in order:
        yield Run(part.base, part.task, BASE)
        tuned = {
            each: Run(part.base, part.task, each, part.budget, 0.0, TUNING_SEED, part.longer) for each in part.methods
        }
        tries = {method: rates_to_try(results, run) for method, run in tuned.items()}
        for place in range(max(map(len, tries.values()))):
            for method, tried in tries.items():
                yield from (replace_rate(tuned[method], rate) for rate in tried[place : place + 1])
        rates = {method: chosen_rate(results, run) for method, run in tuned.items()}
        for seed in part.seeds:
            for method in part.methods:
                if seed == TUNING_SEED and not rates[method]:
                    continue  # it is one of those above
                yield Run(part.base, part.task, method, part.budget, rates[method], seed, part.longer)


def replace_rate(run: Run, rate: float) -> Run:
    return run._replace(learning_rate=rate)


def rates_to_try(results: Mapping[str, Any], tuned: Run) -> list[float]:
    """Those to try first, and then as many beyond as it takes until the best has one that is worse on both sides."""
    known = {rate for rate in FURTHER if replace_rate(tuned, rate).name in results}
    best = FURTHER.index(chosen_rate(results, tuned)) if known else 0
    beside = FURTHER[max(0, best - 1) : best + 2]
    if len(known) > 1 and known >= set(beside):
        return sorted(known)
    if known >= set(LEARNING_RATES):
        return [*sorted(known), *(rate for rate in beside if rate not in known)]
    return [*LEARNING_RATES, *sorted(known - set(LEARNING_RATES))]


def chosen_rate(results: Mapping[str, Any], tuned: Run) -> float:
    """The learning rate with the lowest loss on the part that is neither train nor test; 0 before any was tried."""
    losses = {rate: results[name]["tune"]["loss"] for rate in FURTHER
              if (name := replace_rate(tuned, rate).name) in results}  # fmt: skip
    return min(losses, key=lambda rate: losses[rate]) if losses else 0.0


class Projections(NamedTuple):
    """Features in and out of q_proj and of v_proj, the same in every layer."""

    query: tuple[int, int]
    value: tuple[int, int]


def activated(method: str, width: int, shape: BaseShape, projections: Projections) -> int:
    """Parameters that one token activates, over all layers. width: the bottleneck, or the rank."""
    if method == "qvlora":
        return shape.num_layers * width * sum((*projections.query, *projections.value))
    if method == "router-lora":
        return len(shape.moe_layers) * width * (shape.hidden_size + shape.num_experts)
    return figures(config_of(method, width, shape), shape).activated


def config_of(method: str, width: int, shape: BaseShape) -> AdapterConfig:
    """Of a PERFT variant, for its sizes."""
    of = METHODS[method]
    values: dict[str, Any] = {
        "base_model_name_or_path": "any", "variant": of.variant, "expert_type": "lora", "bottleneck": width,
        "alpha": 2.0 * width, "num_experts": of.experts or shape.num_experts,
    }  # fmt: skip
    if of.top_k:
        values |= {"top_k": of.top_k, "renormalize": False}
    return AdapterConfig.model_validate(values)


def width_of(method: str, budget: int, shape: BaseShape, projections: Projections) -> int:
    """The bottleneck, or the rank, at which a method activates as many parameters as qvLoRA of rank `budget`."""
    wanted = activated("qvlora", budget, shape, projections)
    widths = range(1, 20 * budget)
    return min(widths, key=lambda width: abs(activated(method, width, shape, projections) - wanted))
