"""Owns the metrics page: all of vLLM's families and ours.

Invariant: a family of ours replaces one of the same name (vLLM's `vllm:lora_requests_info` shows NAME@version and
only what runs); every other family of vLLM's is unchanged.
"""

import gzip
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, gzip_accepted
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

LORA_INFO = "vllm:lora_requests_info"
OUR_PREFIX = "perft_"


class MetricsPage(Collector):
    """Our registry, then vLLM's less what ours replaces."""

    def __init__(
        self, ours: CollectorRegistry, theirs: CollectorRegistry = REGISTRY, names: Iterable[str] | None = None
    ) -> None:
        self.ours, self._theirs = ours, theirs
        self._names = None if names is None else frozenset(names)

    def collect(self) -> Iterator[Metric]:
        clear_vllms_adapter_lists(self._theirs)
        replaced = {LORA_INFO}
        for family in self._asked_of(self.ours):
            replaced.add(family.name)
            yield from self._selected(family)
        for family in self._asked_of(self._theirs):
            if family.name not in replaced:
                yield from self._selected(family)

    def restricted_registry(self, names: Iterable[str]) -> "MetricsPage":
        """A page with only the samples of these names (`name[]` in the query)."""
        return MetricsPage(self.ours, self._theirs, names)

    def _asked_of(self, registry: CollectorRegistry) -> Iterable[Metric]:
        """The families asked for: what nobody asked for is not collected."""
        return registry.collect() if self._names is None else registry.restricted_registry(self._names).collect()

    def _selected(self, family: Metric) -> Iterator[Metric]:
        """The family with only the samples asked for; ours without the creation time of each series."""
        kept = Metric(family.name, family.documentation, family.type, family.unit)
        kept.samples = [
            sample
            for sample in family.samples
            if (self._names is None or sample.name in self._names)
            and not (family.name.startswith(OUR_PREFIX) and sample.name == f"{family.name}_created")
        ]
        if kept.samples or self._names is None:
            yield kept


def render(page: "MetricsPage", names: list[str], accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of GET /metrics. Slow with many adapters: call it on a thread.

    names: `name[]` of the query, the samples asked for (empty: all). Always as plain text: prometheus-client writes a
    name with a colon as another one in OpenMetrics, which Prometheus asks for first (vllm:num_requests_running became
    vllm_num_requests_running; prometheus/client_python#1177).
    """
    body = generate_latest(page.restricted_registry(names) if names else page)
    headers = {"content-type": CONTENT_TYPE_PLAIN_0_0_4, "vary": "Accept-Encoding"}
    if gzip_accepted(accept_encoding):
        body = gzip.compress(body, compresslevel=1)
        headers["content-encoding"] = "gzip"
    return body, headers


def clear_vllms_adapter_lists(registry: CollectorRegistry = REGISTRY) -> None:
    """Empty vLLM's own `vllm:lora_requests_info`, which ours replaces.

    It keeps one series for every combination of adapters that ever ran together. Call it regularly: there may be no
    scrapes.
    """
    own = registry._names_to_collectors.get(LORA_INFO)
    if isinstance(own, MetricWrapperBase):
        own.clear()
