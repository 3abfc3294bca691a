"""Owns GET /metrics: the page, with counters that the workers were just asked for."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from server.api.error_responses import ContractRoute
from server.api.openapi import refusals
from server.metrics.exposition import respond

router = APIRouter(route_class=ContractRoute, tags=["server"])


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=refusals(401, 403))
async def metrics(request: Request) -> Response:
    """Every metric of vLLM's and of the adapters, in Prometheus' text format."""
    state = request.app.state
    await state.perft_runtime.refresh()
    return await run_in_threadpool(respond, state.perft_page, request)
