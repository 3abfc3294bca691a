"""Owns the route of an upload.

Invariant: the folder an upload is staged in is gone when its response is sent.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from adapters.store import UNCHANGED, Keys, Unchanged
from server.api.adapters.parameters import adapter_routes, as_object, check_labels
from server.api.dependencies import CallerOf, Services, ServicesOf
from server.api.openapi import ACCESS_ERRORS, UPLOAD_BODY, UPLOADED, errors_of
from server.api.schemas import AdapterObject, AdapterPatch, UploadedAdapter
from server.errors import MalformedUploadError
from server.registry.service import upload_result
from server.uploads.receive import ReceivedUpload, receive_upload

router = adapter_routes()


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
        return as_object(adapter)
    return UploadedAdapter(**as_object(adapter).model_dump(), notes=list(received.notes))


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
        check_labels(labels, services.registry.record(received.name), services.keys.labels)
    return labels
