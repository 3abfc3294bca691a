"""Owns how configurations are compared on a machine that drifts: interleaved rounds, ratios within a round, spread.

Invariant: a ratio is always one of two measurements of the same round, so what slows a whole round cancels.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

RESAMPLES = 2000
INTERVAL = 0.95


@dataclass(frozen=True)
class Spread:
    """Median and range of some values, and a percentile bootstrap interval of their median (95 %)."""

    median: float
    lowest: float
    highest: float
    interval_low: float
    interval_high: float
    count: int

    def __str__(self) -> str:
        return self.shown(2)

    def shown(self, digits: int) -> str:
        """`median (lowest to highest)`."""
        return f"{self.median:.{digits}f} ({self.lowest:.{digits}f} to {self.highest:.{digits}f})"

    def interval(self, digits: int = 3) -> str:
        return f"{self.interval_low:.{digits}f} to {self.interval_high:.{digits}f}"

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("found no values, expected at least one round")
    low, high = interval_of_median(values)
    return Spread(statistics.median(values), min(values), max(values), low, high, len(values))


def interval_of_median(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the median (Efron 1979): medians of RESAMPLES samples with replacement."""
    random = Random(seed)
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - INTERVAL) / 2
    return medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]


def interleaved(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """(round, name): every name once in each round, in an order shuffled anew by `seed`."""
    random = Random(seed)
    for number in range(rounds):
        order = list(names)
        random.shuffle(order)
        for name in order:
            yield number, name


def measured(
    names: Sequence[str], rounds: int, measure: Callable[[str], float], seed: int = 0, unit: str = ""
) -> dict[str, list[float]]:
    """`measure(name)` of every name in every round, printed as it comes: name -> one value for each round."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for number, name in interleaved(names, rounds, seed):
        found[name].append(measure(name))
        print(f"round {number + 1}/{rounds}, {name}: {found[name][-1]:.4g} {unit}".rstrip(), flush=True)
    return found


def ratios(values: Mapping[str, Sequence[float]], base: str, *, inverted: bool = False) -> dict[str, list[float]]:
    """value / base of the same round, for every other name; base / value if `inverted` (times into speeds)."""
    found: dict[str, list[float]] = {}
    for name, own in values.items():
        if name != base:
            pairs = zip(own, values[base], strict=True)
            found[name] = [b / v if inverted else v / b for v, b in pairs]
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
