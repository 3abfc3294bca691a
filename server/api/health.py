"""Owns GET /ready: whether requests can be served."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.dependencies import ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import errors_of
from server.engine.health import DOUBT_AFTER_S
from server.errors import EngineUnavailableError, StoreUnreachableError

router = APIRouter(route_class=ContractRoute, tags=["server"])

READY_TIMEOUT_S = DOUBT_AFTER_S
"""An engine answers between two steps; a long one on a busy CPU takes seconds."""


class Readiness(BaseModel):
    """The server is ready. moe_layers: how many MoE layers carry the operator on every rank."""

    status: Literal["ready"] = "ready"
    moe_layers: int


@router.get("/ready", summary="Whether requests can be served", responses=errors_of(503))
async def ready(services: ServicesOf) -> Readiness:
    """200 once the engine answers and every rank carries the operator."""
    if (doubt := services.engine_health.doubt()) is not None:
        raise EngineUnavailableError(doubt)
    if (problem := services.following.problem()) is not None:
        raise StoreUnreachableError(problem)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            status = await services.engine.status()
    except EngineUnavailableError:
        raise
    except Exception as error:
        raise EngineUnavailableError(f"the engine does not answer ({type(error).__name__})") from error
    if status.moe_layers == 0:
        raise EngineUnavailableError(f"no MoE layer carries the operator: {status.problem}")
    return Readiness(moe_layers=status.moe_layers)
