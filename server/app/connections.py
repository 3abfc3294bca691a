"""Owns how the settings bound the connections of a server: what vLLM's own is given, and the listener for /metrics."""

import asyncio
import os
import resource
from collections.abc import Callable
from typing import Any, cast

import uvloop
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.connections.limits import ConnectionLimits
from server.connections.listener import Listener, listen
from server.connections.protocol import bounded_protocol
from server.errors import StartError
from server.metrics.exposition import MetricsPage, render
from server.settings.model import Settings

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
VLLMS_FILES = 65535
"""What vLLM raises the limit of open files to."""
METRICS_CONNECTIONS = 64
METRICS_RENDERED_AT_ONCE = 2


def limits_of(settings: Settings) -> ConnectionLimits:
    """The limits of the main listener's connections."""
    keep_alive_s = settings.keep_alive_s
    if "keep_alive_s" not in settings.model_fields_set:
        keep_alive_s = float(os.environ.get(KEEP_ALIVE_VARIABLE, keep_alive_s))
    return ConnectionLimits(
        max_header_bytes=settings.max_header_bytes,
        max_headers=settings.max_headers,
        header_timeout_s=settings.header_timeout_s,
        body_idle_timeout_s=settings.body_idle_timeout_s,
        write_timeout_s=settings.write_timeout_s,
        keep_alive_s=keep_alive_s,
        max_connections=min(settings.max_connections, most_connections()),
        max_client_connections=settings.max_client_connections,
        is_proxy=settings.proxies.has,
    )


def most_connections() -> int:
    """As many as leave a quarter of the file descriptors for all else. vLLM raises their limit if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = VLLMS_FILES if hard >= VLLMS_FILES or hard == resource.RLIM_INFINITY else soft
    return limit * 3 // 4


def uvicorn_arguments(settings: Settings) -> dict[str, Any]:
    """What vLLM passes on to uvicorn. Who a proxy asks for is decided by trusted_proxies alone, not by uvicorn."""
    return {"http": bounded_protocol(limits_of(settings)), "proxy_headers": False}


class ServerLoop(uvloop.Loop):
    """uvloop's own loop, whose servers wait for a TLS handshake as long as for headers, not for a minute."""

    handshake_timeout_s: float | None = None

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", self.handshake_timeout_s)
        return cast(asyncio.Server, await super().create_server(*args, **options))


def loop_factory(settings: Settings) -> Callable[[], ServerLoop]:
    """What makes the loop of the server."""

    def make() -> ServerLoop:
        loop = ServerLoop()
        loop.handshake_timeout_s = settings.header_timeout_s
        return loop

    return make


async def serve_metrics(settings: Settings, page: MetricsPage) -> Listener | None:
    """Serve the page on a listener of its own, if the settings name one. Raises StartError."""
    if settings.metrics_address is None:
        return None
    limits = limits_of(settings).with_at_most(METRICS_CONNECTIONS)
    try:
        listener = await listen(_MetricsApp(page), settings.metrics_address, limits)
    except OSError as error:
        raise StartError(f"--metrics-bind {settings.metrics_bind}: cannot be used ({error}); choose another") from error
    if not settings.metrics_address[1]:
        print(f"perft: /metrics is at http://{listener.address}/metrics", flush=True)
    return listener


class _MetricsApp:
    """GET /metrics, without a key. Rendering is slow with many adapters, so few pages are rendered at once."""

    def __init__(self, page: MetricsPage) -> None:
        self._page = page
        self._renders = asyncio.Semaphore(METRICS_RENDERED_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response = Response("expected GET /metrics\n", 404, media_type="text/plain")
        if scope["path"].strip("/") == "metrics" and scope["method"] in ("GET", "HEAD"):
            names = QueryParams(scope["query_string"]).getlist("name[]")
            encoding = Headers(scope=scope).get("accept-encoding", "")
            async with self._renders:
                body, headers = await run_in_threadpool(render, self._page, names, encoding)
            response = Response(body, headers=headers)
        response.headers["X-Content-Type-Options"] = "nosniff"
        await response(scope, receive, send)
