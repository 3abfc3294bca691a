"""Owns the route of a version's files: each is sent whole, and stays until it is sent."""

import os
from contextlib import ExitStack
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.api.adapters.parameters import NO_QUERY, Name, Number, adapter_routes
from server.api.dependencies import CallerOf, RegistryOf
from server.api.openapi import ACCESS_ERRORS, FILE_SENT, errors_of
from server.errors import VersionNotFoundError

router = adapter_routes()

SENT_AS = {"config": (CONFIG_FILE, "application/json"), "weights": (WEIGHTS_FILE, "application/octet-stream")}


@router.get(
    "/v1/adapters/{name}/versions/{version}/files/{file}",
    summary="The bytes of a version",
    dependencies=[NO_QUERY],
    response_class=Response,
    responses=FILE_SENT | errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_file(
    name: Name,
    number: Number,
    file: Literal["config", "weights"],
    request: Request,
    caller: CallerOf,
    registry: RegistryOf,
) -> Response:
    """adapter_config.json or adapter_model.safetensors, as they were uploaded; 304 if the client has it already."""
    version = registry.version(name, number, caller)
    sent_as, media_type = SENT_AS[file]
    tag = f'"{version.record.digest}"'
    if _has_already(request.headers.getlist("if-none-match"), tag):
        return Response(status_code=304, headers={"ETag": tag})
    headers = {"ETag": tag, "Content-Disposition": f'attachment; filename="{sent_as}"'}
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
