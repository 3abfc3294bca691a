"""A /metrics page with made-up state and 5,000 adapters, for conditions that a healthy server never shows.

    python -m integration.made_up_server --port N --key KEY

Every scrape counts one more event for each alert that fires without waiting.
"""

import argparse
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry

from server.api.error_responses import ApiError
from server.metrics.counters import EventCounters
from server.metrics.exposition import MetricsPage, render
from server.metrics.snapshot import AdapterState, StateCollector, StateSnapshot

ADAPTERS = [f"tenant-{number:04}" for number in range(5_000)]


def build_app(key: str) -> FastAPI:
    ours = CollectorRegistry()
    metrics = EventCounters(ours, base_name="base", is_known=set(ADAPTERS).__contains__)
    scrapes = 0

    def snapshot() -> StateSnapshot:
        state = AdapterState(running=1, tier="device")
        return StateSnapshot(
            dict.fromkeys(ADAPTERS, state), 256, device_rows_used=90, device_rows_total=100, store_bytes=10**9,
            store_free_bytes=10**10, moe_layers=30, step_load_bytes=4_096 * scrapes, is_ready=True,
        )  # fmt: skip

    ours.register(StateCollector(metrics, snapshot))
    page = MetricsPage(ours)
    for name in ADAPTERS:
        metrics.request_finished(name, "stop", 10, 10, 1.0)
        metrics.first_token(name, 0.1)
    app = FastAPI()

    @app.get("/metrics")
    def answer(request: Request) -> Response:
        nonlocal scrapes
        if request.headers.get("authorization") != f"Bearer {key}":
            return ApiError(401, "invalid_api_key", "found another key, expected the one of --key").response()
        scrapes += 1
        count_bad_things(metrics)
        names, encoding = request.query_params.getlist("name[]"), request.headers.get("accept-encoding", "")
        body, headers = render(page, names, encoding)
        return Response(body, headers=headers)

    return app


def count_bad_things(metrics: EventCounters) -> None:
    happened: tuple[Callable[[], None], ...] = (
        lambda: metrics.request_finished(ADAPTERS[0], "adapter_output_invalid", 1, 1, 0.1),
        lambda: metrics.load_finished("host", 1.0, "failed"),
        lambda: metrics.repaired("device"),
        lambda: metrics.upload_finished("storage_full"),
        lambda: metrics.experts_worked(ADAPTERS[0], [9, 1]),
    )
    for happen in happened:
        happen()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", required=True)
    arguments = parser.parse_args()
    uvicorn.run(build_app(arguments.key), host="127.0.0.1", port=arguments.port, log_level="warning")
