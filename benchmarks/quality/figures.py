"""Owns what the result files come to: accuracy by method and budget with its interval over seeds, and the comparison
with qvLoRA."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.quality.grid import BASE, METHODS, Run, chosen_rate

QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for an interval of 95 %, by degrees of freedom."""
BASELINE = "qvlora"


class Cell(NamedTuple):
    """One method at one budget of one task. accuracies: one for each seed, in the order of `seeds`; shares of 1.

    activated: parameters that a token activates; efficiency: their share of those of the base that it activates.
    """

    method: str
    budget: int
    width: int
    rate: float
    activated: int
    efficiency: float
    trainable: int
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def half(self) -> float | None:
        """Half of the interval of the mean (Student's t over seeds); None for one seed."""
        return half_interval(self.accuracies)


def half_interval(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return QUANTILES[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def accuracy(result: Mapping[str, Any], part: str = "test") -> float:
    return float(result[part]["right"] / result[part]["examples"])


def cells(results: Mapping[str, Any], base: str, task: str, longer: int = 1) -> list[Cell]:
    """Those that have a result at the learning rate that was chosen, in the order of budgets and methods.

    longer: of runs of so many times the usual steps.
    """
    found = []
    budgets = sorted({each["budget"] for each in results.values() if each["method"] != BASE})
    for budget in budgets:
        for method in METHODS:
            rate = chosen_rate(results, Run(base, task, method, budget, longer=longer))
            ours = [
                each for each in results.values()
                if (each["base"], each["task"], each["method"], each["budget"]) == (base, task, method, budget)
                and each.get("longer", 1) == longer
                and each["learning_rate"] == rate
            ]  # fmt: skip
            if ours:
                ours.sort(key=lambda each: int(each["seed"]))
                one = ours[0]
                found.append(
                    Cell(
                        method, budget, one["width"], rate, one["activated"], one["activated"] / one["base_activated"],
                        one["trainable"], tuple(each["seed"] for each in ours), tuple(map(accuracy, ours)),
                    )
                )  # fmt: skip
    return found


class Comparison(NamedTuple):
    """A cell against qvLoRA of the same budget, over the seeds that both have.

    gain: relative, (mean - mean of qvLoRA) / mean of qvLoRA; None
    where that is 0. half: of its interval, from the differences by seed.
    apart: whether the two accuracies' own intervals do not overlap, and which is higher; None where they do.
    """

    cell: Cell
    seeds: int
    gain: float | None
    half: float | None
    apart: str | None


def comparisons(found: Sequence[Cell]) -> list[Comparison]:
    by_budget = {cell.budget: cell for cell in found if cell.method == BASELINE}
    made = []
    for cell in found:
        lora = by_budget.get(cell.budget)
        if lora is None or cell.method == BASELINE:
            continue
        both = sorted(set(cell.seeds) & set(lora.seeds))
        if not both:
            continue
        ours = [cell.accuracies[cell.seeds.index(seed)] for seed in both]
        theirs = [lora.accuracies[lora.seeds.index(seed)] for seed in both]
        mean = statistics.fmean(theirs)
        half = half_interval([a - b for a, b in zip(ours, theirs, strict=True)])
        made.append(
            Comparison(
                cell, len(both), (statistics.fmean(ours) - mean) / mean if mean else None,
                None if half is None or not mean else half / mean, _apart(ours, theirs),
            )
        )  # fmt: skip
    return made


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> str | None:
    own, other = half_interval(ours), half_interval(theirs)
    if own is None or other is None:
        return None
    a, b = statistics.fmean(ours), statistics.fmean(theirs)
    if a - own > b + other:
        return "higher"
    return "lower" if a + own < b - other else None
