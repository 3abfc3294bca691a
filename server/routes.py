"""Owns the routes of this issue's API.md: which models there are, and whether the server is ready."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.engine import Engine
from server.errors import ApiError, ModelNotFound
from server.registry import Registry

router = APIRouter()
_STARTED = int(time.time())


def _card(model: str, parent: str | None, max_model_len: int) -> dict[str, Any]:
    """OpenAI's model object with vLLM's additions; `root` names no path of the server."""
    return {
        "id": model,
        "object": "model",
        "created": _STARTED,
        "owned_by": "perft",
        "root": parent or model,
        "parent": parent,
        "max_model_len": max_model_len,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base, and every adapter that can be asked by its name."""
    registry: Registry = request.app.state.perft_registry
    length: int = request.app.state.perft_max_model_len
    base = registry.base_names[0]
    cards = [_card(name, None, length) for name in registry.base_names]
    cards += [_card(version.name, base, length) for version in registry.active()]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}", response_model=None)
async def retrieve_model(model: str, request: Request) -> dict[str, Any] | JSONResponse:
    """One model by name."""
    registry: Registry = request.app.state.perft_registry
    try:
        version = registry.resolve(model)
    except ModelNotFound as error:
        return JSONResponse(error.body(), error.status)
    return _card(model, None if version is None else registry.base_names[0], request.app.state.perft_max_model_len)


@router.get("/ready", response_model=None)
async def ready(request: Request) -> dict[str, Any] | JSONResponse:
    """200 once the engine answers and every rank carries the operator."""
    engine: Engine = request.app.state.perft_engine
    try:
        status = await engine.status()
    except Exception as error:
        refused = ApiError(503, "engine_unavailable", f"the engine does not answer ({type(error).__name__})")
        return JSONResponse(refused.body(), refused.status)
    if status.moe_layers == 0:
        refused = ApiError(503, "engine_unavailable", f"no MoE layer carries the operator: {status.problem}")
        return JSONResponse(refused.body(), refused.status)
    return {"status": "ready", "moe_layers": status.moe_layers}
