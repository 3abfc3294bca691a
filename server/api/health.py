"""Owns whether the server is ready, and which routers together are ours.

Invariant: `attach` is the only way our routes get into an app, vLLM's or a test's.
"""

import asyncio
from typing import Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from server.api import adapters, metrics, models
from server.api.error_responses import ContractRoute
from server.api.openapi import describe, refusals
from server.engine.protocol import Engine
from server.errors import ApiError

router = APIRouter(route_class=ContractRoute, tags=["server"])

READY_LIMIT_S = 20.0
"""An engine answers between two steps; a long one on a busy CPU takes seconds."""


class Readiness(BaseModel):
    """That the server is ready. moe_layers: how many MoE layers carry the operator on every rank."""

    status: Literal["ready"] = "ready"
    moe_layers: int


@router.get("/ready", summary="Whether requests can be served", responses=refusals(503))
async def ready(request: Request) -> Readiness:
    """200 once the engine answers and every rank carries the operator."""
    engine: Engine | None = getattr(request.app.state, "perft_engine", None)
    if engine is None:
        raise ApiError(503, "engine_unavailable", "the engine is starting")
    try:
        async with asyncio.timeout(READY_LIMIT_S):
            status = await engine.status()
    except Exception as error:
        message = f"the engine does not answer ({type(error).__name__})"
        raise ApiError(503, "engine_unavailable", message) from error
    if status.moe_layers == 0:
        raise ApiError(503, "engine_unavailable", f"no MoE layer carries the operator: {status.problem}")
    return Readiness(moe_layers=status.moe_layers)


def attach(app: FastAPI) -> None:
    """Hang all of our routes into `app` and let its OpenAPI document describe them."""
    for ours in (adapters.router, models.router, metrics.router, router):
        app.include_router(ours)
    describe(app)
