"""Owns the routes under /v1/adapters (API.md): what stands on the wire, and nothing of what it does.

Invariant: every change goes through the AdapterService, and the folder an upload is staged in is
gone when its answer is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from server.api.error_responses import ContractRoute
from server.api.file_response import FILE_SENT, file_response
from server.api.openapi import GUARD, KEY, PATCH_BODY, UPLOAD_BODY, refusals
from server.api.schemas import AdapterList, AdapterObject, AdapterPatch, VersionObject
from server.auth.keys import Caller
from server.errors import ApiError
from server.metrics.counters import UNLISTED
from server.middleware.access_control import AccessPolicy
from server.middleware.adapter_routing import RoutingParts
from server.registry.service import AdapterService
from server.uploads.receive import UploadLimits, receive_upload

router = APIRouter(route_class=ContractRoute, tags=["adapters"], dependencies=[KEY])

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

LOCATION = {"Location": {"description": "where the adapter is", "schema": {"type": "string"}}}
UPLOADED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": AdapterObject,
        "description": "That content is a version already",
        "headers": LOCATION,
    },
    201: {"description": "The adapter with its new version", "headers": LOCATION},
}


def _whole_number(value: object) -> object:
    """One spelling per version: no sign, no leading zero, no white space."""
    if not (isinstance(value, str) and value.isascii() and value.isdigit() and not value.startswith("0")):
        raise ValueError("a version is a number from 1")
    return value


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _catalog(request: Request) -> AdapterService:
    catalog: AdapterService = request.app.state.perft_catalog
    return catalog


@contextmanager
def _refusals_counted(request: Request) -> Iterator[None]:
    """Count an upload that ends before the catalog, which counts the others, sees it."""
    try:
        yield
    except Exception as error:
        gate: RoutingParts = request.app.state.perft_gate
        gate.metrics.upload(error.code if isinstance(error, ApiError) else UNLISTED)
        raise


def _check_labels(labels: list[str], adapter: AdapterObject, known: frozenset[str]) -> None:
    """Raises ApiError for a label of no key. One that the adapter has already stays: its key may be gone."""
    unknown = set(labels) - known - set(adapter.allowed_keys or ())
    if unknown:
        found, expected = ", ".join(map(repr, sorted(unknown))), ", ".join(sorted(known)) or "none: it has no API keys"
        message = f"found {found}, expected labels of this server's API keys ({expected})"
        raise ApiError(400, "invalid_request", message, "allowed_keys")


CallerOf = Annotated[Caller, Depends(_caller)]
CatalogOf = Annotated[AdapterService, Depends(_catalog)]
Name = Annotated[str, Path(pattern=NAME_PATTERN, description="the adapter's name")]
Version = Annotated[int, Path(ge=1, lt=2**31), BeforeValidator(_whole_number)]


class Page(BaseModel):
    """Which part of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="at most so many")
    after: str | None = Field(None, pattern=NAME_PATTERN, description="only names after this one: a page's `next`")


@router.post(
    "/v1/adapters",
    status_code=201,
    summary="Upload a version",
    responses=UPLOADED | refusals(*GUARD, 400, 408, 409, 413, 503, 507),
    openapi_extra=UPLOAD_BODY,
)
async def upload_adapter(request: Request, response: Response, caller: CallerOf, catalog: CatalogOf) -> AdapterObject:
    """A new version of the adapter `name`, or the existing one of the same content. The body is read as it arrives."""
    limits: UploadLimits = request.app.state.perft_upload_limits
    async with request.app.state.perft_upload_places:
        with _refusals_counted(request):
            staged = await run_in_threadpool(catalog.stage)
        try:
            with _refusals_counted(request):
                received = await receive_upload(request, staged, limits)
            adapter, created = await catalog.upload(received.name, received.folder, received.activate, caller)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(catalog.discard, staged)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/adapters/{adapter.name}"
    return adapter


@router.get("/v1/adapters", summary="List adapters", responses=refusals(*GUARD, 400))
async def list_adapters(page: Annotated[Page, Query()], caller: CallerOf, catalog: CatalogOf) -> AdapterList:
    """The adapters that this key may see, by name."""
    found = catalog.adapters(caller, page.after or "", page.limit + 1)
    data, has_more = found[: page.limit], len(found) > page.limit
    return AdapterList(data=data, has_more=has_more, next=data[-1].name if has_more else None)


@router.get("/v1/adapters/{name}", summary="One adapter", responses=refusals(*GUARD, 404))
async def get_adapter(name: Name, caller: CallerOf, catalog: CatalogOf) -> AdapterObject:
    """The adapter with its versions."""
    return catalog.adapter(name, caller)


@router.patch(
    "/v1/adapters/{name}",
    summary="Activate, roll back, restrict or pin",
    responses=refusals(*GUARD, 400, 404, 409, 503, 507),
    openapi_extra=PATCH_BODY,
)
async def patch_adapter(
    request: Request, name: Name, change: AdapterPatch, caller: CallerOf, catalog: CatalogOf
) -> AdapterObject:
    """All that is given is changed at once, or nothing is; a version is on the host before it becomes active."""
    given = change.model_fields_set
    if not given:
        known = ", ".join(AdapterPatch.model_fields)
        raise ApiError(400, "invalid_request", f"found nothing to change, expected at least one of {known}")
    if "if_active" in given and "active" not in given:
        message = "found if_active alone, expected active beside it: it is the condition of that change"
        raise ApiError(400, "invalid_request", message, "if_active")
    if change.allowed_keys:
        guard: AccessPolicy = request.app.state.perft_guard
        _check_labels(change.allowed_keys, catalog.adapter(name, caller), guard.keys.labels)
    return await catalog.patch(name, change, caller)


@router.delete(
    "/v1/adapters/{name}", status_code=202, summary="Delete an adapter", responses=refusals(*GUARD, 404, 507)
)
async def delete_adapter(name: Name, caller: CallerOf, catalog: CatalogOf) -> AdapterObject:
    """All versions and the name: nothing new is admitted from now on, what runs may finish."""
    return await catalog.delete(name, None, caller)


@router.get("/v1/adapters/{name}/versions/{version}", summary="One version", responses=refusals(*GUARD, 404))
async def get_version(name: Name, version: Version, caller: CallerOf, catalog: CatalogOf) -> VersionObject:
    """One version of the adapter."""
    return catalog.version(name, version, caller)


@router.delete(
    "/v1/adapters/{name}/versions/{version}",
    status_code=202,
    summary="Delete a version",
    responses=refusals(*GUARD, 404, 409, 507),
)
async def delete_version(name: Name, version: Version, caller: CallerOf, catalog: CatalogOf) -> AdapterObject:
    """One version: nothing new is admitted from now on, what runs may finish. Not the active one of several."""
    return await catalog.delete(name, version, caller)


@router.get(
    "/v1/adapters/{name}/versions/{version}/files/{file}",
    summary="The bytes of a version",
    response_class=Response,
    responses=FILE_SENT | refusals(*GUARD, 404),
)
async def get_file(
    name: Name, version: Version, file: Literal["config", "weights"], caller: CallerOf, catalog: CatalogOf
) -> Response:
    """adapter_config.json or adapter_model.safetensors, as they were uploaded."""
    digest = catalog.version(name, version, caller).digest
    return await file_response(catalog.file(name, version, file, caller), file, digest)
