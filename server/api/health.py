"""Owns GET /ready: whether requests can be served."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.dependencies import ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import errors_of
from server.errors import EngineUnavailableError

router = APIRouter(route_class=ContractRoute, tags=["server"])

READY_TIMEOUT_S = 20.0
"""An engine answers between two steps; a long one on a busy CPU takes seconds."""


class Readiness(BaseModel):
    """The server is ready. moe_layers: how many MoE layers carry the operator on every rank."""

    status: Literal["ready"] = "ready"
    moe_layers: int


@router.get("/ready", summary="Whether requests can be served", responses=errors_of(503))
async def ready(services: ServicesOf) -> Readiness:
    """200 once the engine answers and every rank carries the operator."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            status = await services.engine.status()
    except Exception as error:
        raise EngineUnavailableError(f"the engine does not answer ({type(error).__name__})") from error
    if status.moe_layers == 0:
        raise EngineUnavailableError(f"no MoE layer carries the operator: {status.problem}")
    return Readiness(moe_layers=status.moe_layers)
