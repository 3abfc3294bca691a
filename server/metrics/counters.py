"""Owns the metrics that count events (docs/metrics.md): requests, tokens, latencies, loads, evictions, uploads.

Invariant: the label `adapter` is a bare NAME out of at most `max_adapters`, the base's served name, or `_other`; every
other label takes values of a closed list. So the number of series is bounded, whatever clients send.
State (what runs, what is resident) is in `server.metrics.snapshot`, the page itself in `server.metrics.exposition`.
"""

from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from server.metrics.labels import OTHER, AdapterLabels

DEFAULT_MAX_ADAPTERS = 500
MAX_EXPERTS = 64

LoadTier = Literal["host", "device"]
LoadResult = Literal["ok", "failed"]

UNLISTED = "error"
REFUSED = "invalid_request"
# OpenAI's and vLLM's finish reasons, then the codes of requests that end early. REFUSED: vLLM's engine rejected the
# request's parameters before its first output.
FINISH_REASONS = (
    *("stop", "length", "tool_calls", "content_filter", "repetition", "abort", "error"),
    *("adapter_deleted", "adapter_output_invalid", "adapter_unavailable", "device_full", REFUSED),
    *("engine_unavailable", "rate_limited"),
)
# Their series exist from the adapter's first request on: `increase()` misses the step that creates a series.
EXPECTED_FINISH_REASONS = ("stop", "length", "abort", "error", "adapter_deleted", "adapter_output_invalid")
# 201 and 200, then the codes of uploads that passed access control (its rejections are in `http_requests_total`).
UPLOAD_RESULTS = (
    *("created", "existing", "invalid_adapter", "invalid_name", "invalid_request", "name_conflict"),
    *("adapter_too_large", "upload_timeout", "quota_exceeded", "storage_full", "device_full"),
    *("adapter_unavailable", "adapter_deleted", UNLISTED),
)
LOAD_TIERS: tuple[LoadTier, ...] = ("host", "device")
LOAD_RESULTS: tuple[LoadResult, ...] = ("ok", "failed")

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LOAD_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class EventCounters:
    """Counts events. Safe from any thread.

    base_name: the label of requests without an adapter (None), so that one graph compares base and adapters; it does
    not count towards `max_adapters`. is_known: see AdapterLabels.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        max_adapters: int = DEFAULT_MAX_ADAPTERS,
        *,
        base_name: str = "_base",
        is_known: Callable[[str], bool] | None = None,
    ) -> None:
        self.base_name, self.max_adapters = base_name, max_adapters
        self._names = AdapterLabels(max_adapters, is_known)
        self._lock = RLock()
        self._make_adapter_metrics(registry)
        self._make_server_metrics(registry)
        for label in (base_name, OTHER):
            self._create_series(label)

    def _make_adapter_metrics(self, registry: CollectorRegistry) -> None:
        adapter = ("adapter",)
        self._requests = Counter(
            "perft_adapter_requests_total",
            "Requests that ended, by finish reason.",
            ("adapter", "finish_reason"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "perft_adapter_prompt_tokens_total", "Prompt tokens of requests that ended.", adapter, registry=registry
        )
        self._generation_tokens = Counter(
            "perft_adapter_generation_tokens_total", "Tokens generated for requests that ended.", adapter,
            registry=registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "perft_adapter_time_to_first_token_seconds",
            "From a request's arrival to its first token, loading its adapter included.",
            adapter, registry=registry, buckets=FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self._inter_token = Histogram(
            "perft_adapter_inter_token_latency_seconds",
            "From one token of a request to its next.",
            adapter, registry=registry, buckets=INTER_TOKEN_BUCKETS,
        )  # fmt: skip
        self._e2e = Histogram(
            "perft_adapter_e2e_seconds",
            "From a request's arrival to its end.",
            adapter, registry=registry, buckets=E2E_BUCKETS,
        )  # fmt: skip
        self._expert_tokens = Counter(
            "perft_expert_tokens_total", "Tokens of sampled steps that each expert of an adapter processed.",
            ("adapter", "expert"), registry=registry,
        )  # fmt: skip

    def _make_server_metrics(self, registry: CollectorRegistry) -> None:
        self._load_seconds = Histogram(
            "perft_adapter_load_seconds",
            "Seconds that a successful load of an adapter to a tier took.",
            ("tier",), registry=registry, buckets=LOAD_BUCKETS,
        )  # fmt: skip
        self._loads = Counter(
            "perft_adapter_loads_total", "Loads of adapters to a tier, by result.", ("result",), registry=registry
        )
        self._evictions = Counter(
            "perft_adapter_evictions_total",
            "Adapters evicted from a tier to make room.",
            ("tier",),
            registry=registry,
        )
        self._repairs = Counter(
            "perft_residency_repairs_total",
            "Differences, now repaired, between what a worker held in a tier and what the server expected.",
            ("tier",),
            registry=registry,
        )
        self._uploads = Counter(
            "perft_uploads_total", "Uploads by result: created, existing, or the error code.", ("result",),
            registry=registry,
        )  # fmt: skip
        for tier in LOAD_TIERS:
            self._load_seconds.labels(tier)
            self._evictions.labels(tier)
            self._repairs.labels(tier)
        for result in LOAD_RESULTS:
            self._loads.labels(result)
        for outcome in UPLOAD_RESULTS:
            self._uploads.labels(outcome)

    def _by_adapter_alone(self) -> tuple[MetricWrapperBase, ...]:
        return self._prompt_tokens, self._generation_tokens, self._first_token, self._inter_token, self._e2e

    def _create_series(self, label: str) -> None:
        """Create the series of `label`, at 0."""
        for reason in EXPECTED_FINISH_REASONS:
            self._requests.labels(label, reason)
        for metric in self._by_adapter_alone():
            metric.labels(label)

    def _label(self, adapter: str | None) -> str:
        """The label of `adapter`, which gets one of its own if one is left. Call it under the lock."""
        if adapter is None or adapter == self.base_name:
            return self.base_name
        if self._names.take(adapter):
            self._create_series(adapter)
        return adapter if self._names.holds(adapter) else OTHER

    def request_finished(
        self, adapter: str | None, finish_reason: str, prompt_tokens: int, generation_tokens: int, seconds: float
    ) -> None:
        """A request that was admitted has ended. An unlisted finish reason counts as "error"."""
        reason = finish_reason if finish_reason in FINISH_REASONS else UNLISTED
        with self._lock:
            label = self._label(adapter)
            self._requests.labels(label, reason).inc()
            self._prompt_tokens.labels(label).inc(prompt_tokens)
            self._generation_tokens.labels(label).inc(generation_tokens)
            self._e2e.labels(label).observe(seconds)

    def first_token(self, adapter: str | None, seconds: float) -> None:
        """A request's first token came `seconds` after the request arrived."""
        with self._lock:
            self._first_token.labels(self._label(adapter)).observe(seconds)

    def inter_token(self, adapter: str | None, seconds: float, tokens: int = 1) -> None:
        """`tokens` more tokens came `seconds` after the last one; each counts with its share."""
        with self._lock:
            histogram = self._inter_token.labels(self._label(adapter))
            for _ in range(tokens):
                histogram.observe(seconds / tokens)

    def experts_worked(self, adapter: str, tokens: Sequence[int]) -> None:
        """Count tokens by expert of one version; experts from MAX_EXPERTS on count as one."""
        shown = {str(expert): count for expert, count in enumerate(tokens[:MAX_EXPERTS])}
        if len(tokens) > MAX_EXPERTS:
            shown[OTHER] = sum(tokens[MAX_EXPERTS:])
        with self._lock:
            label = self._label(adapter)
            for expert, count in shown.items():
                self._expert_tokens.labels(label, expert).inc(count)

    def load_finished(self, tier: LoadTier, seconds: float, result: LoadResult) -> None:
        """A load of an adapter to a tier ended."""
        self._loads.labels(result).inc()
        if result == "ok":
            self._load_seconds.labels(tier).observe(seconds)

    def evicted(self, tier: LoadTier) -> None:
        """An adapter was evicted from a tier to make room for another."""
        self._evictions.labels(tier).inc()

    def upload_finished(self, result: str) -> None:
        """An upload ended: "created", "existing" or the error's code; an unlisted one counts as "error"."""
        self._uploads.labels(result if result in UPLOAD_RESULTS else UNLISTED).inc()

    def repaired(self, tier: LoadTier) -> None:
        """A worker held something else in a tier than the server expected, and it was repaired."""
        self._repairs.labels(tier).inc()

    def adapter_deleted(self, adapter: str) -> None:
        """Remove the series of a deleted name, and free its label."""
        with self._lock:
            if self._names.release(adapter):
                for metric in (self._requests, self._expert_tokens, *self._by_adapter_alone()):
                    metric.remove_by_labels({"adapter": adapter})

    def labels_of(self, active: Iterable[str], idle: Iterable[str]) -> dict[str, str]:
        """The label of every adapter that exists, for what is read at a scrape.

        `active` ones (running, waiting, loaded) take labels. `idle` ones take none, so that they leave the labels to
        adapters in use; they are shown by name only while every name fits.
        """
        with self._lock:
            shown = {name: self._label(name) for name in active}
            idle = list(idle)
            everything_fits = self._names.all_fit({*shown, *idle})
            for name in idle:
                shown[name] = name if everything_fits or self._names.holds(name) else OTHER
        return shown
