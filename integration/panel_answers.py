"""Asks a Prometheus what each panel of Grafana's dashboard asks, with the dashboard's variables filled in."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from integration.prometheus import DEPLOYED, Prometheus

DASHBOARD = DEPLOYED.parent / "grafana" / "dashboards" / "perft.json"
CHOSEN = {"instance": ".*", "adapter": ".*", "top": "10", "datasource": "perft-prometheus"}
STEPS = 240


@dataclass(frozen=True)
class Series:
    """One line: points are (unix seconds, value), without those that are no number."""

    name: str
    labels: Mapping[str, str]
    points: list[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Answered:
    """A panel with what each of its queries found, by refId."""

    panel: dict[str, Any]
    found: dict[str, list[Series]]

    @property
    def title(self) -> str:
        title: str = self.panel["title"]
        return title

    @property
    def empty(self) -> list[str]:
        """The queries that found nothing."""
        return [ref for ref, series in self.found.items() if not series]

    @property
    def series(self) -> list[Series]:
        return [each for series in self.found.values() for each in series]


@dataclass(frozen=True)
class Span:
    """The time that is shown, in unix seconds, and how often something is scraped in it."""

    start: float
    end: float
    scrape_s: float

    @property
    def step_s(self) -> float:
        return max(1.0, (self.end - self.start) / STEPS)

    def fill(self, query: str) -> str:
        """The query with Grafana's variables and ours filled in."""
        rate_s = max(self.step_s + self.scrape_s, 4 * self.scrape_s)
        values = CHOSEN | {"__rate_interval": f"{rate_s:.0f}s", "__range": f"{self.end - self.start:.0f}s"}
        return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], query)


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def ask(prometheus: Prometheus, panel: dict[str, Any], span: Span) -> Answered:
    """Raises urllib.error.HTTPError for a query that does not parse."""
    found = {target["refId"]: list(_answers(prometheus, target, span)) for target in panel.get("targets", [])}
    return Answered(panel, found)


def ask_all(prometheus: Prometheus, span: Span) -> list[Answered]:
    return [ask(prometheus, panel, span) for panel in read()["panels"]]


def _answers(prometheus: Prometheus, target: dict[str, Any], span: Span) -> Iterator[Series]:
    query = span.fill(target["expr"])
    if target["instant"]:
        result = prometheus.get("query", query=query, time=f"{span.end}")["result"]
        answers = [(each["metric"], [each["value"]]) for each in result]
    else:
        times = {"start": f"{span.start}", "end": f"{span.end}", "step": f"{span.step_s}"}
        result = prometheus.get("query_range", query=query, **times)["result"]
        answers = [(each["metric"], each["values"]) for each in result]
    for labels, values in answers:
        points = [(float(at), float(value)) for at, value in values if math.isfinite(float(value))]
        if points:
            legend = re.sub(r"\{\{(\w+)\}\}", lambda found, has=labels: has.get(found[1], ""), target["legendFormat"])
            yield Series(legend or ", ".join(labels.values()), labels, points)


def report(answered: Sequence[Answered]) -> list[str]:
    """A line for each query that found nothing."""
    return [f"{each.title}: query {ref} found nothing" for each in answered for ref in each.empty]
