"""Owns OpenAI's list of models: the base, and every adapter that the caller may select by its name.

Invariant: no card names a path of the server.
"""

import re
import time
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from server.api.dependencies import CallerOf, ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import ACCESS_ERRORS, KEY, errors_of
from server.errors import ModelNotFoundError
from server.inference.selection import selected

router = APIRouter(route_class=ContractRoute, tags=["models"], dependencies=[KEY])
_STARTED = int(time.time())
_SLASHES = re.compile("/{2,}")


class ModelCard(BaseModel):
    """OpenAI's model object with vLLM's additions. created: unix seconds."""

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


@router.get("/v1/models", summary="List models", response_model=ModelList, responses=errors_of(*ACCESS_ERRORS))
async def list_models(caller: CallerOf, services: ServicesOf) -> Response:
    """The base, and every adapter that can be selected by its name."""
    await services.following.admit()
    length, base_names = services.max_model_len, services.base_names
    cards = [_card(name, _STARTED, None, length).model_dump_json() for name in base_names]
    cards += _adapter_cards(services.registry.servable(caller), base_names[0], length)
    return Response(f'{{"object":"list","data":[{",".join(cards)}]}}', media_type="application/json")


@router.get("/v1/models/{model:path}", summary="One model", responses=errors_of(*ACCESS_ERRORS, 404))
async def retrieve_model(model: str, caller: CallerOf, services: ServicesOf) -> ModelCard:
    """The base, NAME or NAME@version."""
    try:
        version = await selected(services, model, caller)
    except ModelNotFoundError:
        if (plain := _SLASHES.sub("/", model).strip("/")) == model:
            raise
        model, version = (
            plain,
            await selected(services, plain, caller),
        )  # as in every other path, slashes count once
    if version is None:
        return _card(model, _STARTED, None, services.max_model_len)
    return _card(model, version.record.created, services.base_names[0], services.max_model_len)


def _card(model: str, created: int, parent: str | None, length: int) -> ModelCard:
    return ModelCard(id=model, created=created, root=parent or model, parent=parent, max_model_len=length)


def _adapter_cards(adapters: list[tuple[str, int]], base: str, length: int) -> list[str]:
    """The adapters' cards as JSON. There may be thousands, made on the event loop, so what they share is written once;
    a name needs no escapes."""
    shared = _card(base, 0, base, length).model_dump_json(exclude={"id", "created"})[1:]
    return [f'{{"id":"{name}","created":{created},{shared}' for name, created in adapters]
