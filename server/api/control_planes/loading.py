"""Owns vLLM's routes that load and unload adapters, by which control planes drive engines: a load is an upload from an
allowed place, an unload a delete with drain. There only where the operator allows places (--adapter-source).

Invariant: requests and successes have vLLM's form, errors ours; no field is taken and ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from server.api.dependencies import CallerOf, ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import ACCESS_ERRORS, KEY, SAID, errors_of
from server.errors import AdapterNotFoundError, InvalidNameError, InvalidRequestError, NameConflictError
from server.registry.registry import check_name

router = APIRouter(route_class=ContractRoute, tags=["control planes"], dependencies=[KEY])
Name = Annotated[str, Field(min_length=1, max_length=256, description="the adapter's name")]


class LoadRequest(BaseModel):
    """vLLM's LoadLoRAAdapterRequest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name
    lora_path: str = Field(min_length=1, description="where it is: below a place that the operator allows")
    load_inplace: bool = Field(False, description="whether it may replace other content that is active")
    base_model_name: str | None = Field(None, description="the base's served name")
    is_3d_lora_weight: bool = Field(False, description="must be false")


class UnloadRequest(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest. lora_int_id: has no meaning there either."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name
    lora_int_id: int | None = None


@router.post(
    "/v1/load_lora_adapter",
    summary="Load an adapter from an allowed place",
    response_class=Response,
    responses=SAID | errors_of(*ACCESS_ERRORS, 400, 404, 409, 413, 503, 507),
)
async def load_adapter(asked: LoadRequest, caller: CallerOf, services: ServicesOf) -> Response:
    """What is there becomes the active version of the name. The same content again changes nothing."""
    if (base := asked.base_model_name) is not None and base not in services.base_names:
        message = f"found the base {base[:100]!r}, expected {', '.join(services.base_names)}, which this server serves"
        raise InvalidRequestError(message, param="base_model_name")
    if asked.is_3d_lora_weight:
        message = "found true, expected false: such weights are vLLM's own; this server's adapters say what they hold"
        raise InvalidRequestError(message, param="is_3d_lora_weight")
    with _param("lora_name"):
        check_name(asked.lora_name, services.base_names)
        found = services.sources.allowed(asked.lora_path)
        await services.sources.load(asked.lora_name, found, caller, replaces=asked.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    summary="Delete an adapter",
    response_class=Response,
    responses=SAID | errors_of(*ACCESS_ERRORS, 400, 404, 507),
)
async def unload_adapter(asked: UnloadRequest, caller: CallerOf, services: ServicesOf) -> Response:
    """All versions and the name, as DELETE /v1/adapters/{name}: running requests may finish."""
    with _param("lora_name"):
        await services.adapters.delete(asked.lora_name, None, caller)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


@contextmanager
def _param(field: str) -> Iterator[None]:
    """Errors about the name are errors about that field here."""
    try:
        yield
    except (InvalidNameError, NameConflictError, AdapterNotFoundError) as error:
        error.param = field
        raise
