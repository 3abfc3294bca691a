"""Owns OpenAI's list of models: the base, and every adapter that the caller may select by its name.

Invariant: no card names a path of the server.
"""

import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.api.adapters import CallerOf, CatalogOf
from server.api.error_responses import ContractRoute
from server.api.openapi import GUARD, KEY, refusals

router = APIRouter(route_class=ContractRoute, tags=["models"], dependencies=[KEY])
_STARTED = int(time.time())


class ModelCard(BaseModel):
    """OpenAI's model object with vLLM's additions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "perft"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def _card(request: Request, model: str, created: int, parent: str | None) -> ModelCard:
    length: int = request.app.state.perft_max_model_len
    return ModelCard(id=model, created=created, root=parent or model, parent=parent, max_model_len=length)


def _cards(request: Request, adapters: list[tuple[str, int]], base: str) -> list[str]:
    """The adapters' cards as JSON. There may be thousands, made on the event loop, so what they share is written once;
    a name needs no escapes."""
    shared = _card(request, base, 0, base).model_dump_json(exclude={"id", "created"})[1:]
    return [f'{{"id":"{name}","created":{created},{shared}' for name, created in adapters]


@router.get("/v1/models", summary="List models", response_model=ModelList, responses=refusals(*GUARD))
async def list_models(request: Request, caller: CallerOf, catalog: CatalogOf) -> Response:
    """The base, and every adapter that can be asked by its name."""
    cards = [_card(request, name, _STARTED, None).model_dump_json() for name in catalog.base_names]
    cards += _cards(request, catalog.servable(caller), catalog.base_names[0])
    return Response(f'{{"object":"list","data":[{",".join(cards)}]}}', media_type="application/json")


@router.get("/v1/models/{model:path}", summary="One model", responses=refusals(*GUARD, 404))
async def retrieve_model(model: str, request: Request, caller: CallerOf, catalog: CatalogOf) -> ModelCard:
    """The base, NAME or NAME@version."""
    version = catalog.resolve(model, caller)
    if version is None:
        return _card(request, model, _STARTED, None)
    return _card(request, model, version.record.created, catalog.base_names[0])
