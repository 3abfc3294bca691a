"""Owns the routes under /v1/adapters (docs/api.md): requests and responses, not the changes themselves.

Invariant: every change goes through the AdapterService, and the folder an upload is staged in is gone when its response
is sent.
"""

import os
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal, TypeVar, get_args

import anyio
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.names import NAME_PATTERN
from adapters.store import UNCHANGED, AdapterRecord, Keys, Unchanged
from server.api.dependencies import AdapterServiceOf, CallerOf, RegistryOf, Services, ServicesOf
from server.api.error_responses import ContractRoute
from server.api.openapi import ACCESS_ERRORS, FILE_SENT, KEY, PATCH_BODY, UPLOAD_BODY, UPLOADED, errors_of
from server.api.schemas import AdapterList, AdapterObject, AdapterPatch, Tier, UploadedAdapter, VersionObject
from server.auth.keys import Caller
from server.errors import (
    AdapterUnavailableError,
    DeviceFullError,
    InvalidRequestError,
    MalformedUploadError,
    VersionNotFoundError,
)
from server.registry.listing.page import ListQuery, Order, list_adapters
from server.registry.service import upload_result
from server.registry.version import AdapterView, Version
from server.sharing.turns import Turns
from server.uploads.receive import ReceivedUpload, receive_upload

router = APIRouter(route_class=ContractRoute, tags=["adapters"], dependencies=[KEY])

T = TypeVar("T")
SENT_AS = {"config": (CONFIG_FILE, "application/json"), "weights": (WEIGHTS_FILE, "application/octet-stream")}


def _whole_number(value: object) -> object:
    """One spelling per version: no sign, no leading zero, no white space."""
    if not (isinstance(value, str) and value.isascii() and value.isdigit() and not value.startswith("0")):
        raise ValueError("a version is a number from 1")
    return value


Name = Annotated[str, Path(pattern=f"^{NAME_PATTERN}$", description="the adapter's name")]
Number = Annotated[int, Path(ge=1, lt=2**31, alias="version"), BeforeValidator(_whole_number)]


Sorting = Literal[
    "name", "rows", "running", "last_used", "created", "-name", "-rows", "-running", "-last_used", "-created"
]
_ORDERS: dict[str, Order] = {f"{sign}{order}": order for sign in ("", "-") for order in get_args(Order)}


async def _version(name: Name, number: Number, caller: CallerOf, registry: RegistryOf) -> Version:
    return registry.version(name, number, caller)


VersionOf = Annotated[Version, Depends(_version)]


async def _no_query(request: Request) -> None:
    """`DELETE /v1/adapters/poet?version=2` must not delete all of poet. Raises InvalidRequestError."""
    for parameter in request.query_params:
        shown = ascii(parameter)[1:-1][:100]
        message = f"found the query parameter {shown!r}, expected none: a version is part of the path"
        raise InvalidRequestError(message, param=shown)


NO_QUERY = Depends(_no_query)


class Page(BaseModel):
    """Which adapters, in which order, and which part of them."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="the most adapters to return")
    after: str | None = Field(
        None, pattern=f"^{NAME_PATTERN}$", description="only names after this one: a page's `next`; of a list by name"
    )
    offset: int = Field(0, ge=0, le=2**31, description="how many adapters to leave out in front; not with `after`")
    search: str = Field(
        "",
        max_length=200,
        description="only adapters with this in their name or in the active version's description, in any case",
    )
    resident: Tier | None = Field(None, description="only adapters whose active version is there")
    sort: Sorting = Field(
        "name",
        description="of the active version; `-` in front: descending. Adapters of the same value are by name, those "
        "without a value, or without an active version, come last",
    )
    versions: Literal["all", "active"] = Field(
        "all", description="which versions each adapter has: all, or the active one alone (the newest where none is)"
    )


@router.post(
    "/v1/adapters",
    status_code=201,
    summary="Upload a version",
    responses=UPLOADED | errors_of(*ACCESS_ERRORS, 400, 408, 409, 413, 415, 503, 507),
    openapi_extra=UPLOAD_BODY,
)
async def upload_adapter(
    request: Request, response: Response, caller: CallerOf, services: ServicesOf
) -> UploadedAdapter | AdapterObject:
    """A new version of the adapter `name`, or the existing one of the same content. The body is read as it arrives."""
    service, metrics = services.adapters, services.metrics
    async with services.upload_slots:
        with _counting_failures(metrics.upload_finished):
            staged = await run_in_threadpool(service.stage)
        try:
            with _counting_failures(metrics.upload_finished):
                received = await receive_upload(
                    request.headers, _body(request), staged, services.upload_limits, request.query_params
                )
                keys = _checked_keys(received, services)
            adapter, created = await service.upload(
                received.name, received.folder, received.activate, caller, allowed_keys=keys
            )
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(service.discard, staged)
    response.status_code = 201 if created else 200
    root = request.scope.get("root_path", "")
    response.headers["Location"] = f"{root}/v1/adapters/{adapter.name}/versions/{adapter.uploaded}"
    if not received.notes:
        return _object(adapter)
    return UploadedAdapter(**_object(adapter).model_dump(), notes=list(received.notes))


@router.get(
    "/v1/adapters", summary="List adapters", response_model=AdapterList, responses=errors_of(*ACCESS_ERRORS, 400)
)
async def get_adapters(
    page: Annotated[Page, Query()], caller: CallerOf, registry: RegistryOf, services: ServicesOf
) -> Response:
    """The adapters that this key may see. What use changes of them (tier, requests, last use) may be a second old."""
    if page.after is not None and (page.offset or page.sort != "name"):
        reason = "one of them" if page.offset else "after only in a list by name; use offset for the next page"
        message = f"found after with {'offset' if page.offset else 'sort'}, expected {reason}"
        raise InvalidRequestError(message, param="after")
    query = ListQuery(
        search=page.search,
        resident=page.resident,
        order=_ORDERS[page.sort],
        is_descending=page.sort.startswith("-"),
        after=page.after or "",
        offset=page.offset,
        limit=page.limit,
        active_only=page.versions == "active",
    )
    key = caller, query, registry.changes
    content = await services.lists.result(key, lambda: _list(query, caller, services))
    return Response(content, media_type="application/json")


async def _list(query: ListQuery, caller: Caller, services: Services) -> bytes:
    """The body of the answer."""
    found = await _in_turns(list_adapters(services.registry, caller, query), services.list_turns)
    is_by_name = query.order == "name" and not query.is_descending
    next_name = found.data[-1].name if found.has_more and is_by_name else None
    data = [_object(adapter) for adapter in found.data]
    content = AdapterList(data=data, has_more=found.has_more, next=next_name, total=found.total)
    return content.model_dump_json().encode()


async def _in_turns(work: Generator[None, None, T], turns: Turns) -> T:
    """What the work returns; each of its steps waits for its turn on the event loop."""
    while True:
        await turns.step()
        try:
            next(work)
        except StopIteration as done:
            result: T = done.value
            return result


@router.get(
    "/v1/adapters/{name}",
    summary="One adapter",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_adapter(name: Name, caller: CallerOf, registry: RegistryOf) -> AdapterObject:
    """The adapter with its versions."""
    return _object(registry.adapter(name, caller))


@router.patch(
    "/v1/adapters/{name}",
    summary="Activate, roll back, restrict or pin",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 409, 413, 503, 507),
    openapi_extra=PATCH_BODY,
)
async def patch_adapter(name: Name, change: AdapterPatch, caller: CallerOf, services: ServicesOf) -> AdapterObject:
    """All that is given is changed at once, or nothing is; a version is on the host before it becomes active."""
    given = change.model_dump(include=change.model_fields_set)
    if not given:
        known = ", ".join(AdapterPatch.model_fields)
        raise InvalidRequestError(f"found nothing to change, expected at least one of {known}")
    if "if_active" in given and "active" not in given:
        message = "found if_active alone, expected active beside it: it is the condition of that change"
        raise InvalidRequestError(message, param="if_active")
    if change.allowed_keys:
        await services.following.fresh(name)
        services.registry.visible(name, caller)
        _check_labels(change.allowed_keys, services.registry.record(name), services.keys.labels)
    try:
        return _object(await services.adapters.patch(name, given, caller))
    except (DeviceFullError, AdapterUnavailableError) as error:
        error.param = error.param or ("active" if "active" in given else "pinned")
        raise


@router.delete(
    "/v1/adapters/{name}",
    status_code=202,
    summary="Delete an adapter",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 507),
)
async def delete_adapter(name: Name, caller: CallerOf, service: AdapterServiceOf) -> AdapterObject:
    """All versions and the name: nothing new is admitted from now on, running requests may finish."""
    return _object(await service.delete(name, None, caller))


@router.get(
    "/v1/adapters/{name}/versions/{version}",
    summary="One version",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_version(version: VersionOf, caller: CallerOf, registry: RegistryOf) -> VersionObject:
    """One version of the adapter."""
    return VersionObject.model_validate(registry.version_view(version, caller))


@router.delete(
    "/v1/adapters/{name}/versions/{version}",
    status_code=202,
    summary="Delete a version",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404, 409, 507),
)
async def delete_version(name: Name, number: Number, caller: CallerOf, service: AdapterServiceOf) -> AdapterObject:
    """One version: nothing new is admitted from now on, running requests may finish. Not the active one of several."""
    return _object(await service.delete(name, number, caller))


@router.get(
    "/v1/adapters/{name}/versions/{version}/files/{file}",
    summary="The bytes of a version",
    dependencies=[NO_QUERY],
    response_class=Response,
    responses=FILE_SENT | errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_file(
    version: VersionOf, file: Literal["config", "weights"], request: Request, registry: RegistryOf
) -> Response:
    """adapter_config.json or adapter_model.safetensors, as they were uploaded; 304 if the client has it already."""
    name, media_type = SENT_AS[file]
    tag = f'"{version.record.digest}"'
    if _has_already(request.headers.getlist("if-none-match"), tag):
        return Response(status_code=304, headers={"ETag": tag})
    headers = {"ETag": tag, "Content-Disposition": f'attachment; filename="{name}"'}
    if file == "config":
        return Response(version.record.config.encode(), headers=headers, media_type=media_type)
    with ExitStack() as stack:
        stack.enter_context(registry.reading(version))
        content = await run_in_threadpool(registry.weights_file, version)
        try:
            found = await run_in_threadpool(os.stat, content)
        except FileNotFoundError:
            raise VersionNotFoundError(version.name, version.number) from None  # it was deleted just now
        reading = stack.pop_all()
    headers |= {"Accept-Ranges": "none"}
    return _WholeFile(reading, content, headers=headers, media_type=media_type, stat_result=found)


class _WholeFile(FileResponse):
    """A file that is always sent whole: a Range is ignored, as HTTP allows. reading: closed once it is sent."""

    def __init__(self, reading: ExitStack, path: os.PathLike[str], **more: Any) -> None:
        super().__init__(path, **more)
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reading:
            await self._send(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        method = "HEAD" if scope.get("state", {}).get("is_head") else scope["method"]  # then it is not read
        await super().__call__({**scope, "headers": headers, "method": method}, receive, send)


def _has_already(given: list[str], tag: str) -> bool:
    """Whether the values of If-None-Match name the content."""
    tags = [one.strip().removeprefix("W/") for value in given for one in value.split(",")]
    return tag in tags or tags == ["*"]


def _object(adapter: AdapterView) -> AdapterObject:
    return AdapterObject.model_validate(adapter)


async def _body(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises MalformedUploadError if the client goes away."""
    try:
        async for chunk in request.stream():
            if chunk:
                yield chunk
    except ClientDisconnect as error:
        raise MalformedUploadError("the connection ended before the body did") from error


@contextmanager
def _counting_failures(count: Any) -> Iterator[None]:
    """Count an upload that ends before the service, which counts the others, sees it."""
    try:
        yield
    except Exception as error:
        count(upload_result(error))
        raise


def _checked_keys(received: ReceivedUpload, services: Services) -> Keys:
    """The labels of an upload, checked as those of a PATCH. Raises RequestValidationError or InvalidRequestError."""
    if isinstance(received.allowed_keys, Unchanged):
        return UNCHANGED
    try:
        labels = AdapterPatch.model_validate({"allowed_keys": received.allowed_keys}).allowed_keys
    except ValidationError as error:
        raise RequestValidationError([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None
    if labels:
        _check_labels(labels, services.registry.record(received.name), services.keys.labels)
    return labels


def _check_labels(labels: list[str], record: AdapterRecord | None, known: frozenset[str]) -> None:
    """Raises InvalidRequestError for a label of no key. One that the adapter has already stays: its key may be gone."""
    unknown = set(labels) - known - set((record.allowed_keys if record is not None else None) or ())
    if unknown:
        found, expected = ", ".join(map(repr, sorted(unknown))), ", ".join(sorted(known)) or "none: it has no API keys"
        message = f"found {found}, expected labels of this server's API keys ({expected})"
        raise InvalidRequestError(message, param="allowed_keys")
