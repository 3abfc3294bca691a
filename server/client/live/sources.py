"""Owns what `perft top` asks a server for: whether it is ready, its metrics, one page of adapters.

Invariant: a scrape has only the samples that are shown, and 5,000 adapters cost no more than a page of them.
"""

import time

from server.client.connection import ClientError
from server.client.http import AdapterPage, AdaptersClient
from server.client.live.samples import Change, History, parse

MOST_ROWS = 200
TTFT, INTER_TOKEN = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
ADAPTER_TTFT = "perft_adapter_time_to_first_token_seconds"
SAMPLES = (
    "perft_adapter_requests_total", "perft_adapter_generation_tokens_total", f"{ADAPTER_TTFT}_sum",
    f"{ADAPTER_TTFT}_count", "perft_adapter_requests_running", "perft_adapter_requests_waiting",
    "perft_adapter_loads_total", "perft_adapter_evictions_total", "perft_device_rows_used", "perft_device_rows_total",
    f"{TTFT}_bucket", f"{INTER_TOKEN}_bucket", "vllm:num_requests_running", "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "http_requests_total",
)  # fmt: skip
PAGES = ("/metrics", "/console/metrics")
"""Where the metrics may be: the second one where `--metrics-bind` moved the first."""


class Sources:
    """One server, asked by several pollers. Every method raises ClientError."""

    def __init__(self, client: AdaptersClient) -> None:
        self._client, self._history, self._page = client, History(), PAGES[0]
        self.sort, self.search = "-running", ""
        """Of the adapters: the API's order, and the text that is looked for."""

    def ready(self) -> bool:
        """True. Raises ClientError with the reason where it is not."""
        self._client.get("/ready")
        return True

    def metrics(self) -> Change:
        """What changed over the last seconds."""
        try:
            text = self._scrape(self._page)
        except ClientError as error:
            if error.status != 404:
                raise
            self._page = next(page for page in PAGES if page != self._page)
            text = self._scrape(self._page)
        try:
            return self._history.add(parse(text, time.monotonic()))
        except (ValueError, IndexError, KeyError) as error:
            raise ClientError(f"found something other than Prometheus' text at {self._page} ({error})") from None

    def adapters(self) -> AdapterPage:
        """The first adapters of the order; by name from a server that knows no other."""
        ordered = {"versions": "active", "sort": self.sort} | ({"search": self.search} if self.search else {})
        try:
            return self._client.page(limit=MOST_ROWS, **ordered)
        except ClientError as error:
            if error.status != 400:
                raise
            return self._client.page(limit=MOST_ROWS)

    def _scrape(self, page: str) -> str:
        return self._client.get(page, [("name[]", sample) for sample in SAMPLES])
