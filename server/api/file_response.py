"""Owns how the two files of a version are sent back: the bytes as uploaded, streamed, with the digest as their ETag."""

import os
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters.format.folder import CONFIG_FILE, WEIGHTS_FILE
from server.errors import ApiError

SENT_AS = {"config": (CONFIG_FILE, "application/json"), "weights": (WEIGHTS_FILE, "application/octet-stream")}

_TEXT = {"schema": {"type": "string"}}
FILE_SENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file, byte for byte",
        "content": {
            "application/json": {"schema": {"type": "object", "description": "adapter_config.json"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
        "headers": {
            "ETag": _TEXT | {"description": "the version's digest"},
            "Content-Disposition": _TEXT | {"description": "the file's name"},
        },
    }
}


async def file_response(content: Path | bytes, file: Literal["config", "weights"], digest: str) -> Response:
    """The answer with a file's content. Raises ApiError 404 if the file has just been deleted."""
    name, media_type = SENT_AS[file]
    headers = {"ETag": f'"{digest}"', "Content-Disposition": f'attachment; filename="{name}"'}
    if isinstance(content, bytes):
        return Response(content, headers=headers, media_type=media_type)
    try:
        found = await run_in_threadpool(os.stat, content)
    except FileNotFoundError:
        raise ApiError(404, "version_not_found", "found the version deleted while its file was asked for") from None
    return WholeFile(content, headers=headers | {"Accept-Ranges": "none"}, media_type=media_type, stat_result=found)


class WholeFile(FileResponse):
    """A file that is always sent whole: a Range is ignored, as HTTP allows."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)
