"""Owns what vLLM's HTTP metrics (`http_requests_total` and its kin) count: every answer, refusals included.

Invariant: the counters are made once. The app's stack is built twice, and a middleware that makes its own finds their
names taken the second time and counts nothing.
"""

import re
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import metrics
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware import Middleware


def count_every_answer(app: FastAPI) -> None:
    """Put the middleware that counts around all that the app has by now.

    What it excludes (/health, /version, ...) are whole paths from then on: vLLM's words would exclude
    /v1/adapters/{name}/versions/{version} too.
    """
    middleware: Any = PrometheusInstrumentatorMiddleware
    for given in [each for each in app.user_middleware if each.cls is middleware]:
        options: dict[str, Any] = dict(given.kwargs)
        options["excluded_handlers"] = [re.compile(f"^{path.pattern}$") for path in options["excluded_handlers"]]
        if (counting := metrics.default(registry=options["registry"])) is not None:
            options["instrumentations"] = [counting]
        app.user_middleware.remove(given)
        app.user_middleware.insert(0, Middleware(middleware, **options))
