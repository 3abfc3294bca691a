"""Owns the page itself: GET /metrics, all of vLLM's families and ours, and a bind of its own for it.

Invariant: a family of ours replaces one of the same name (vLLM's `vllm:lora_requests_info` shows NAME@version and
only what runs); everything else of vLLM's is there as it is.
"""

import gzip
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, gzip_accepted
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from server.errors import StartError

LORA_INFO = "vllm:lora_requests_info"
OUR_PREFIX = "perft_"


class MetricsPage(Collector):
    """Our registry, then vLLM's less what ours replaces."""

    def __init__(
        self, ours: CollectorRegistry, theirs: CollectorRegistry = REGISTRY, names: Iterable[str] | None = None
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self._names = None if names is None else frozenset(names)

    def collect(self) -> Iterator[Metric]:
        forget_vllms_adapter_lists(self._theirs)
        replaced = {LORA_INFO}
        for family in self._ours.collect():
            replaced.add(family.name)
            yield from self._selected(family)
        for family in self._theirs.collect():
            if family.name not in replaced:
                yield from self._selected(family)

    def restricted_registry(self, names: Iterable[str]) -> "MetricsPage":
        """Only samples of these names: what `name[]` in the query asks for."""
        return MetricsPage(self._ours, self._theirs, names)

    def _selected(self, family: Metric) -> Iterator[Metric]:
        """The family without what was not asked for, and ours without the time each series was made."""
        kept = Metric(family.name, family.documentation, family.type, family.unit)
        kept.samples = [
            sample
            for sample in family.samples
            if (self._names is None or sample.name in self._names)
            and not (family.name.startswith(OUR_PREFIX) and sample.name == f"{family.name}_created")
        ]
        if kept.samples or self._names is None:
            yield kept


def respond(page: MetricsPage, request: Request) -> Response:
    """The answer to GET /metrics. Slow with many adapters: call it on a thread.

    Always as plain text: prometheus-client writes a name with a colon as another one in OpenMetrics, which Prometheus
    asks for first (vllm:num_requests_running became vllm_num_requests_running; prometheus/client_python#1177).
    """
    names = request.query_params.getlist("name[]")
    body = generate_latest(page.restricted_registry(names) if names else page)
    headers = {"content-type": CONTENT_TYPE_PLAIN_0_0_4, "vary": "Accept-Encoding"}
    if gzip_accepted(request.headers.get("accept-encoding", "")):
        body = gzip.compress(body, compresslevel=1)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers)


def serve_on(bind: str, page: MetricsPage) -> Callable[[], None]:
    """Serve the page on a bind of its own, HOST:PORT or [IPv6]:PORT; returns what ends it. Raises StartError."""
    host, port = parse_bind(bind)
    try:
        server, thread = start_http_server(port, host, page)
        server.set_app(_as_plain_text(server.get_app()))
    except OSError as error:
        raise StartError(f"the metrics bind {bind} cannot be used ({error}): choose another") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def _as_plain_text(app: Any) -> Callable[[dict[str, Any], Any], Any]:
    """A WSGI app that is told to answer as `respond` does."""
    return lambda environ, start_response: app({**environ, "HTTP_ACCEPT": ""}, start_response)


def parse_bind(bind: str) -> tuple[str, int]:
    """HOST and PORT. Raises StartError."""
    host, colon, port = bind.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise StartError(f"found the metrics bind {bind!r}, expected HOST:PORT (127.0.0.1:9090, [::1]:9090)")
    return host, int(port)


def forget_vllms_adapter_lists(registry: CollectorRegistry = REGISTRY) -> None:
    """Empty vLLM's own `vllm:lora_requests_info`, which nobody sees.

    It keeps one series for every combination of adapters that ever ran together. Call it now and then as well as at
    scrapes, which may never come.
    """
    own = registry._names_to_collectors.get(LORA_INFO)
    if isinstance(own, MetricWrapperBase):
        own.clear()
