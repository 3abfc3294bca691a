"""Owns the metrics that are read at a scrape: what runs, waits and is resident.

Invariant: one scrape shows one snapshot; nothing is kept between two.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.metrics.counters import EventCounters

Tier = Literal["device", "host", "disk"]

LEVELS = {"device": "gpu", "host": "cpu"}
"""Tier -> vLLM's word for it."""
MAX_LIST_CHARACTERS = 16_384


@dataclass(frozen=True)
class AdapterState:
    """One adapter now: requests of all its versions; tier: where its active version is (None: it has none).

    rank: of its experts, or of a PEFT LoRA adapter (None: it has none).
    """

    running: int = 0
    waiting: int = 0
    tier: Tier | None = "disk"
    pinned: bool = False
    rank: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether it has requests or takes memory."""
        return bool(self.running or self.waiting) or self.tier in ("device", "host")


@dataclass(frozen=True)
class StateSnapshot:
    """What the server holds now. max_lora: adapters that the device holds at once (`device_capacity`).

    store_free_bytes: free on the store's disk (None: not known, not shown). store_silent_s, store_names_behind: of a
    store that others share (None: none do, not shown). is_ready: as /ready says, but for a server that is ending.
    """

    adapters: Mapping[str, AdapterState]
    max_lora: int
    base_running: int = 0
    base_waiting: int = 0
    device_rows_used: int = 0
    device_rows_total: int = 0
    store_bytes: int = 0
    store_free_bytes: int | None = None
    moe_layers: int = 0
    step_load_bytes: int = 0
    is_ready: bool = False
    store_silent_s: float | None = None
    store_names_behind: int | None = None


Totals = dict[tuple[str, ...], float]


class StateCollector(Collector):
    """Takes a snapshot at every scrape, on the scrape's thread: `snapshot` must answer from memory."""

    def __init__(self, metrics: EventCounters, snapshot: Callable[[], StateSnapshot]) -> None:
        self._metrics, self._snapshot = metrics, snapshot

    def describe(self) -> list[Metric]:
        """The families without samples, for the registry's check that no name is given twice."""
        state = StateSnapshot({}, 0, store_free_bytes=0, store_silent_s=0, store_names_behind=0)
        return list(self._families(state))

    def collect(self) -> Iterator[Metric]:
        yield from self._families(self._snapshot())

    def _families(self, state: StateSnapshot) -> Iterator[Metric]:
        labels = self._labels(state)
        yield from self._adapter_families(state, labels)
        yield from _server_families(state)
        yield lora_requests_info(state, time.time())
        yield from lora_residency(state, self._metrics.base_name, self._metrics.max_adapters)

    def _labels(self, state: StateSnapshot) -> dict[str, str]:
        active = [name for name, adapter in state.adapters.items() if adapter.is_active]
        idle = [name for name, adapter in state.adapters.items() if not adapter.is_active]
        return self._metrics.labels_of(active, idle)

    def _adapter_families(self, state: StateSnapshot, labels: Mapping[str, str]) -> Iterator[Metric]:
        running: Totals = defaultdict(float, {(self._metrics.base_name,): state.base_running})
        waiting: Totals = defaultdict(float, {(self._metrics.base_name,): state.base_waiting})
        resident: Totals = defaultdict(float)
        for name, adapter in state.adapters.items():
            running[(labels[name],)] += adapter.running
            waiting[(labels[name],)] += adapter.waiting
            if adapter.tier is not None:
                resident[(labels[name], adapter.tier)] += 1
        adapter_only = ("adapter",)
        yield _gauge(
            "perft_adapter_requests_running",
            "Sequences in the engine: each of the n choices of a request counts.",
            adapter_only,
            running,
        )
        yield _gauge(
            "perft_adapter_requests_waiting",
            "Requests that wait for their adapter, or for a sequence of the full engine.",
            adapter_only,
            waiting,
        )
        yield _gauge(
            "perft_adapter_resident",
            "1 for the tier of the adapter's active version (for _other: how many adapters).",
            ("adapter", "tier"),
            resident,
        )


def _server_families(state: StateSnapshot) -> Iterator[Metric]:
    gauges: dict[str, tuple[str, float | None]] = {
        "perft_ready": ("1 while the engine and a shared store answer, and layers carry the operator.", state.is_ready),
        "perft_device_rows_used": ("Rows of the device pool that hold an adapter.", state.device_rows_used),
        "perft_device_rows_total": ("Rows of the device pool.", state.device_rows_total),
        "perft_store_bytes": ("Bytes that the adapters take on disk.", state.store_bytes),
        "perft_moe_layers": ("MoE layers that carry the operator on every rank; must never be 0.", state.moe_layers),
        "perft_store_free_bytes": ("Bytes free on the store's disk.", state.store_free_bytes),
        "perft_store_silent_seconds": ("Seconds since the shared store last answered.", state.store_silent_s),
        "perft_store_names_behind": (
            "Names that other servers changed in the shared store and that this one has not taken over yet.",
            state.store_names_behind,
        ),
    }
    for name, (documentation, value) in gauges.items():
        if value is not None:
            yield GaugeMetricFamily(name, documentation, value)
    yield CounterMetricFamily(
        "perft_step_load_bytes",
        "Bytes of adapters read, hashed or packed inside an engine step; must stay 0.",
        state.step_load_bytes,
    )


def lora_requests_info(state: StateSnapshot, now: float) -> Metric:
    """vLLM's gauge with the meaning that the Gateway API inference extension gives it: what is on the device.

    Names are bare, joined by commas without spaces, those with most requests first; the value is the time in unix
    seconds.
    """
    on_device = {name: each.running for name, each in state.adapters.items() if each.tier == "device"}
    waiting = {name: each.waiting for name, each in state.adapters.items() if each.waiting}
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters resident on the device, and those that requests wait for.",
        labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
    )
    family.add_metric((str(state.max_lora), _joined(waiting), _joined(on_device)), now)
    return family


def lora_residency(state: StateSnapshot, base_name: str, most: int) -> Iterator[Metric]:
    """What llm-d's router reads of where adapters are. most: series by adapter; those on the device come first."""
    resident = [(name, each) for name, each in state.adapters.items() if each.tier in LEVELS]
    resident.sort(key=lambda found: (found[1].tier != "device", found[0]))
    loaded = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "1 for an adapter whose active version is on the device (level gpu) or only in host memory (cpu).",
        labels=("adapter_name", "level", "pinned", "rank"),
    )
    for name, each in resident[:most]:
        rank = "" if each.rank is None else str(each.rank)
        loaded.add_metric((name, LEVELS[each.tier or ""], str(each.pinned).lower(), rank), 1)
    yield loaded
    on_device = sum(each.tier == "device" for _, each in resident)
    counts = {
        "vllm:num_gpu_loaded_lora_adapters": ("Adapters whose active version is on the device.", on_device),
        "vllm:max_gpu_lora_adapters": ("Adapters that the device holds at once.", state.max_lora),
    }
    for name, (documentation, count) in counts.items():
        yield _gauge(name, documentation, ("model_name",), {(base_name,): count})


def device_capacity(on_device: int, free_rows: int, rows: Sequence[int], free_slots: int, if_unknown: int) -> int:
    """How many adapters the device holds at once: those that it holds, and as many more of the mean size as fit.

    rows: of each known PERFT adapter. free_slots: for PEFT LoRA. if_unknown: how many more where none is known.
    """
    more = free_rows * len(rows) // sum(rows) if sum(rows) else if_unknown
    return on_device + more + free_slots


def _joined(names: Mapping[str, int]) -> str:
    """The names, highest number first, as many as the length of a label allows."""
    kept: list[str] = []
    length = -1
    for name in sorted(names, key=lambda name: (-names[name], name)):
        length += len(name) + 1
        if length > MAX_LIST_CHARACTERS:
            break
        kept.append(name)
    return ",".join(kept)


def _gauge(name: str, documentation: str, labels: Sequence[str], totals: Totals) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for values, total in totals.items():
        family.add_metric(values, total)
    return family
