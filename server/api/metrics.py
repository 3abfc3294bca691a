"""Owns GET /metrics: the page, with the workers' counters of this moment."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from server.api.dependencies import ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import errors_of

router = APIRouter(route_class=ContractRoute, tags=["server"])


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=errors_of(401, 403))
async def metrics(request: Request, services: ServicesOf) -> Response:
    """Every metric of vLLM and of the adapters, in Prometheus' text format."""
    page = services.metrics_page
    await page.refresh()
    names, encoding = request.query_params.getlist("name[]"), request.headers.get("accept-encoding", "")
    body, headers = await run_in_threadpool(page.render, names, encoding)
    return Response(body, headers=headers)
