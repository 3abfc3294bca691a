"""Owns the part of the metrics that the console draws: a choice of all adapters', or every series of one.

Invariant: only what is shown is collected, so that one adapter's series cost the same however many adapters there are.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.metrics.exposition import MetricsPage
from server.metrics.snapshot import AdapterState


def _histogram(name: str) -> tuple[str, ...]:
    return f"{name}_bucket", f"{name}_sum", f"{name}_count"


SUMMED = ("perft_adapter_time_to_first_token_seconds",)
"""Histograms of which only sum and count are shown, for every adapter that has counted any."""
COUNTED = ("perft_adapter_requests", "perft_adapter_prompt_tokens", "perft_adapter_generation_tokens")
"""Counters of every adapter. What is 0, as most are, is left out, but for the first series: who reads them takes a
series that is not there for 0, and a name that is not there for not known."""
WHOLE = (
    *("perft_adapter_requests_running", "perft_adapter_requests_waiting"),
    *_histogram("perft_adapter_load_seconds"),
    *("perft_adapter_loads_total", "perft_adapter_evictions_total", "perft_uploads_total"),
    *("perft_device_rows_used", "perft_device_rows_total", "perft_store_bytes", "perft_store_free_bytes"),
    *("perft_moe_layers", "perft_residency_repairs_total", "perft_step_load_bytes_total"),
    *_histogram("vllm:time_to_first_token_seconds"),
    *_histogram("vllm:inter_token_latency_seconds"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "http_requests_total", "process_start_time_seconds"),
)
"""Samples that are shown as they are, those of vLLM where it has them."""
OF_ONE = (
    *(*COUNTED, *SUMMED, "perft_adapter_inter_token_latency_seconds"),
    *("perft_adapter_e2e_seconds", "perft_expert_tokens"),
)
"""Families of one adapter, with all buckets."""

WORK_S, REST_S = 0.001, 0.05
_number: Callable[[float], str] = floatToGoString
StateOf = Callable[[str], AdapterState | None]
"""The state of one adapter, or of the base by its name; None: there is no such name. It answers from memory."""


def render_choice(page: MetricsPage, state_of: StateOf, adapter: str | None = None) -> bytes:
    """The page's choice of all adapters' metrics, or all series of `adapter`, in Prometheus' text format.

    Slow with many adapters: call it on a thread, which rests after every millisecond of work, so that the event loop
    waits no longer for the interpreter, nor a step of an engine on the same cores for a core.
    """
    if adapter is not None:
        return generate_latest(_OneAdapter(page.ours, adapter, state_of(adapter)))
    parts = list[str]()
    began = time.perf_counter()
    for part in chain(_families(page), _lines(page.ours)):
        parts.append(part)
        if time.perf_counter() - began > WORK_S:
            time.sleep(REST_S)
            began = time.perf_counter()
    return "".join(parts).encode()


def _families(page: MetricsPage) -> Iterator[str]:
    """WHOLE: gauges, of which each adapter has some, a line at a time, other families whole."""
    for family in page.restricted_registry(WHOLE).collect():
        if family.type == "gauge":
            yield _header(family.name, family.documentation, family.type)
            for name, labels, value, *_ in family.samples:
                yield f"{_start(name, tuple(labels), tuple(labels.values()))}{_number(value)}\n"
        else:
            yield generate_latest(_Only(family)).decode()


@dataclass(frozen=True)
class _Only(Collector):
    family: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.family


def _lines(registry: CollectorRegistry) -> Iterator[str]:
    """COUNTED and SUMMED."""
    for name in COUNTED:
        if isinstance(counter := _registered(registry, name), Counter):
            yield _header(f"{name}_total", counter._documentation, counter._type)
            total, labels = f"{name}_total", tuple(counter._labelnames)
            for number, (values, child) in enumerate(_children(counter)):
                if (counted := child._value.get()) or number == 0:
                    yield f"{_start(total, labels, values)}{_number(counted)}\n"
    for name in SUMMED:
        if isinstance(histogram := _registered(registry, name), Histogram):
            yield _header(name, histogram._documentation, histogram._type)
            total, count, labels = f"{name}_sum", f"{name}_count", tuple(histogram._labelnames)
            for values, child in _children(histogram):
                if observed := sum(bucket.get() for bucket in child._buckets):
                    yield f"{_start(total, labels, values)}{_number(child._sum.get())}\n"
                    yield f"{_start(count, labels, values)}{_number(observed)}\n"


def _header(name: str, documentation: str, kind: str) -> str:
    told = documentation.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {told}\n# TYPE {name} {kind}\n"


@lru_cache(maxsize=50_000)
def _start(name: str, labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    """A line up to its value, as `generate_latest` writes it, without its checking and quoting of every name and label
    every time, which is most of its time. labels: as many as values."""
    if not labels:
        return f"{name} "
    quoted = [value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for value in values]
    given = ",".join(f'{label}="{value}"' for label, value in sorted(zip(labels, quoted, strict=True)))
    return f"{name}{{{given}}} "


class _OneAdapter(Collector):
    def __init__(self, registry: CollectorRegistry, adapter: str, state: AdapterState | None) -> None:
        self._registry, self._adapter, self._state = registry, adapter, state

    def collect(self) -> Iterator[Metric]:
        for name in OF_ONE:
            if isinstance(found := _registered(self._registry, name), Counter | Histogram):
                family = _series(found, self._adapter)
                yield from [family] if family.samples else []
        if self._state is not None:
            gauges = {"running": self._state.running, "waiting": self._state.waiting}
            for name, value in gauges.items():
                family = GaugeMetricFamily(f"perft_adapter_requests_{name}", f"Requests {name}.", labels=("adapter",))
                family.add_metric((self._adapter,), value)
                yield family


def _registered(registry: CollectorRegistry, name: str) -> Collector | None:
    return registry._names_to_collectors.get(name)


def _children(metric: MetricWrapperBase) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of the labels and the value of every series that there is now."""
    with metric._lock:
        children: list[tuple[Any, Any]] = list(metric._metrics.items())
    yield from children


def _family(metric: MetricWrapperBase) -> Metric:
    return Metric(metric._name, metric._documentation, metric._type or "untyped")


def _series(metric: MetricWrapperBase, adapter: str) -> Metric:
    """The samples whose label `adapter` has that value, but for when each series was created."""
    family = _family(metric)
    place = list(metric._labelnames).index("adapter")
    for values, child in _children(metric):
        if values[place] == adapter:
            labels = dict(zip(metric._labelnames, values, strict=True))
            for sample in child._samples():
                if sample.name != "_created":
                    family.add_sample(f"{family.name}{sample.name}", labels | sample.labels, sample.value)
    return family
