"""Owns what follows from scrapes of /metrics: sums, rates and quantiles over the last seconds.

Invariant: a counter that fell (the server was started again) begins anew; nothing is ever computed across that.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]

WINDOW_S = 10.0
"""The seconds over which rates and quantiles are computed."""
COUNTER_ENDINGS = ("_total", "_count", "_sum", "_bucket")


@dataclass(frozen=True)
class Scrape:
    """The samples of one moment. at: monotonic seconds. values: sample name -> labels -> value."""

    at: float
    values: Mapping[str, Mapping[Labels, float]]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a sample's series that have these labels; None if there is none."""
        found = [value for key, value in self.values.get(name, {}).items() if key >= set(labels.items())]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a sample's series by one label."""
        sums = dict[str, float]()
        for key, value in self.values.get(name, {}).items():
            for found, text in key:
                if found == label:
                    sums[text] = sums.get(text, 0.0) + value
        return sums


def parse(text: str, at: float) -> Scrape:
    """A scrape of Prometheus' text format. Raises ValueError."""
    values = dict[str, dict[Labels, float]]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Scrape(at, values)


class History:
    """The scrapes of the last WINDOW_S seconds: the newest, and what changed since the oldest."""

    def __init__(self) -> None:
        self._scrapes = deque[Scrape]()

    def add(self, scrape: Scrape) -> "Change":
        if self._scrapes and _was_reset(self._scrapes[-1], scrape):
            self._scrapes.clear()
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.at - self._scrapes[1].at >= WINDOW_S:
            self._scrapes.popleft()
        return Change(self._scrapes[0], scrape)


@dataclass(frozen=True)
class Change:
    """What changed from one scrape to a later one. Of one scrape alone nothing is known yet: None everywhere."""

    old: Scrape
    new: Scrape

    @property
    def seconds(self) -> float:
        return self.new.at - self.old.at

    def increase(self, name: str, **labels: str) -> float | None:
        """How much a counter grew; a series that was not there before counts from 0, one that went away not at all."""
        now = self.new.total(name, **labels)
        return None if now is None or self.seconds <= 0 else max(0.0, now - (self.old.total(name, **labels) or 0.0))

    def rate(self, name: str, **labels: str) -> float | None:
        """The same for each second."""
        grown = self.increase(name, **labels)
        return None if grown is None else grown / self.seconds

    def rates(self, name: str, label: str) -> dict[str, float]:
        """The rate for each value of a label."""
        if self.seconds <= 0:
            return {}
        before = self.old.by(name, label)
        now = self.new.by(name, label)
        return {text: max(0.0, value - before.get(text, 0.0)) / self.seconds for text, value in now.items()}

    def means(self, histogram: str, label: str) -> dict[str, float]:
        """The mean of what a histogram observed meanwhile, for each value of a label with an observation."""
        sums, counts = self.rates(f"{histogram}_sum", label), self.rates(f"{histogram}_count", label)
        return {text: sums[text] / count for text, count in counts.items() if count > 0 and text in sums}

    def quantile(self, histogram: str, share: float) -> float | None:
        """The quantile (share 0 to 1) of what a histogram observed meanwhile, over all its series."""
        if self.seconds <= 0:
            return None
        before = self.old.by(f"{histogram}_bucket", "le")
        now = self.new.by(f"{histogram}_bucket", "le")
        return quantile(((float(le), count - before.get(le, 0.0)) for le, count in now.items()), share)


def quantile(buckets: Iterable[tuple[float, float]], share: float) -> float | None:
    """As PromQL's histogram_quantile. buckets: (upper bound, cumulative count). None: nothing was observed.

    Within a bucket the observations count as evenly spread; beyond the last finite bound the answer is that bound.
    """
    ordered = sorted(buckets)
    if not ordered or ordered[-1][0] != math.inf or ordered[-1][1] <= 0:
        return None
    rank = share * ordered[-1][1]
    low = below = 0.0
    for bound, count in ordered:
        if count >= rank and count > below:
            if bound == math.inf:
                return low
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, max(below, count)
    return None


def _was_reset(old: Scrape, new: Scrape) -> bool:
    return any(
        key in new.values.get(name, {}) and new.values[name][key] < value
        for name, series in old.values.items()
        if name.endswith(COUNTER_ENDINGS)
        for key, value in series.items()
    )
