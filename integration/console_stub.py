"""The console's routes until the server has its own: a stand-in for the authors of the page."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

PAGE = Path(__file__).parents[1] / "server" / "console" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}


def with_stub(app: FastAPI) -> ASGIApp:
    """The app with the console's routes, if it has none."""
    if any(getattr(route, "path", "") == "/console/session" for route in app.routes):
        return app
    stub = Starlette(
        routes=[
            Route("/", lambda _: FileResponse(PAGE / "index.html", headers=HEADERS)),
            Route("/console/session", session_of(app)),
            Route("/console/metrics", metrics_of(app)),
            Mount("/console", StaticFiles(directory=PAGE)),
        ]
    )

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_ours = scope["type"] == "http" and (path == "/" or path.startswith("/console/"))
        await (stub if is_ours else app)(scope, receive, send)

    return serve


def session_of(app: FastAPI) -> Any:
    async def session(request: Request) -> Response:
        services = app.state.services
        settings = services.settings
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        keys = {key.get_secret_value().partition("=")[2]: key.get_secret_value().partition("=")[0]
                for key in settings.api_keys}  # fmt: skip
        admin = None if settings.admin_key is None else settings.admin_key.get_secret_value()
        metrics = None if settings.metrics_key is None else settings.metrics_key.get_secret_value()
        is_admin = admin is None or given == admin
        label = "admin" if is_admin and admin else keys.get(given)
        may = {
            "use": is_admin or label is not None,
            "change": is_admin,
            "watch": is_admin or given == metrics,
        }
        kind = "known" if label else "metrics" if given and given == metrics else "unknown" if given else "none"
        return JSONResponse(
            {
                "label": label, "key": kind, "needs_key": bool(keys), "may": may,
                "why_not": {what: "found no key with that right" for what, is_so in may.items() if not is_so},
                "base": services.base_names, "key_labels": sorted(keys.values()) if is_admin else [],
                "version": "0.1.0", "vllm": "0.32.0",
                "limits": {"max_adapter_bytes": settings.max_adapter_bytes,
                           "drain_timeout_s": settings.drain_timeout_s, "max_model_len": services.max_model_len},
                "following": None, "engine": services.engine_health.doubt(),
            }
        )  # fmt: skip

    return session


def metrics_of(app: FastAPI) -> Any:
    async def metrics(request: Request) -> Response:
        page, name = app.state.services.metrics_page, request.query_params.get("adapter")
        await page.refresh()
        text = generate_latest(page.page)
        if name is not None:
            lines = text.splitlines(keepends=True)
            text = b"".join(line for line in lines if line.startswith(b"#") or f'adapter="{name}"'.encode() in line)
        return Response(text, media_type="text/plain")

    return metrics
