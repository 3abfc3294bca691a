"""Owns the smallest server that an upload can be tried against: stage, receive, check the name and the format, 201."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.format.folder import read_folder
from perft.base_model import BaseShape
from server.api.adapters.upload import _body
from server.api.error_responses import as_api_error
from server.errors import ServerError
from server.registry.registry import check_name
from server.uploads.receive import UploadLimits, receive_upload
from tests.hostile.attack import Attack, Cut, Pause, Setting, Upload

BASE = BaseShape(hidden_size=8, num_layers=3, moe_layers=(0, 2), num_experts=4, top_k=2, dtype=torch.float32)
SETTING = Setting(BASE, "tiny-moe", max_adapter_bytes=256 * 1024, timeout_s=3600, idle_timeout_s=3600)
IMPATIENT = replace(SETTING, timeout_s=0.6, idle_timeout_s=0.25)
"""For what comes too slowly. Nothing else: on a busy machine a sound upload comes slowly too."""


def setting_for(attack: Attack) -> Setting:
    """Limits under which the attack meets its own refusal, however fast the machine is."""
    setting = IMPATIENT if attack.code == "upload_timeout" else SETTING
    return replace(setting, max_adapter_bytes=max(setting.max_adapter_bytes, attack.needs_bytes))


class LocalApp:
    """An ASGI app for POST /v1/adapters; keeps nothing. `folder` is where it stages."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting

    @property
    def limits(self) -> UploadLimits:
        return UploadLimits(self.setting.max_adapter_bytes, self.setting.timeout_s, self.setting.idle_timeout_s)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await (await self._answer(Request(scope, receive)))(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        staged = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            received = await receive_upload(request.headers, _body(request), staged, self.limits)
            check_name(received.name, [self.setting.base_name])
            limits = Limits(self.setting.max_adapter_bytes)
            adapter = await asyncio.to_thread(read_folder, received.folder, self.setting.base, limits)
            found = sorted(path.name for path in staged.iterdir())
            taken = {"name": received.name, "activate": received.activate, "digest": adapter.digest, "files": found}
            return JSONResponse(taken, 201)
        except (ServerError, InvalidAdapterError) as error:
            return as_api_error(error).response()
        finally:
            shutil.rmtree(staged)


@dataclass
class Outcome:
    """What came back, and how many bytes of the body the app asked for."""

    status: int
    headers: dict[str, str]
    body: bytes
    taken_bytes: int

    @property
    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer


async def _messages(upload: Upload) -> AsyncIterator[dict[str, Any]]:
    """What a server would hand on: never more than the Content-Length, and nothing more where less came."""
    left = upload.content_length
    for piece in upload.pieces:
        if isinstance(piece, Cut):
            yield {"type": "http.disconnect"}
        elif isinstance(piece, Pause):
            await asyncio.sleep(piece.seconds)
        else:
            data = piece if left is None else piece[:left]
            left = None if left is None else left - len(data)
            yield {"type": "http.request", "body": data, "more_body": left is None or left > 0}
    if left:
        await asyncio.sleep(3600)
    yield {"type": "http.request", "body": b"", "more_body": False}


async def answer(app: Any, upload: Upload) -> Outcome:
    """What `app` answers to one upload."""
    outcome = Outcome(0, {}, b"", 0)
    messages = _messages(upload)

    async def receive() -> dict[str, Any]:
        message = await anext(messages)
        outcome.taken_bytes += len(message.get("body", b""))
        return message

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            outcome.status = message["status"]
            outcome.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        outcome.body += message.get("body", b"")

    told: dict[str, str | None] = {"content-type": upload.content_type, **(upload.headers or {})}
    if upload.content_length is not None:
        told["content-length"] = str(upload.content_length)
    headers = [(name.lower().encode(), value.encode()) for name, value in told.items() if value is not None]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/adapters", "query_string": b"", "headers": headers,
        "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return outcome


def run(app: Any, upload: Upload) -> Outcome:
    """Answer one upload in a loop of its own."""
    return asyncio.run(answer(app, upload))
