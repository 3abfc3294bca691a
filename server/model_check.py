"""Owns the first look at every request: whether its `model` is served here, before vLLM sees it.

An ASGI middleware. vLLM checks the name again later; this one answers with OpenAI's error object and API.md's code.
"""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.registry import Registry


class ModelCheck:
    """Refuses a JSON request whose `model` names nothing; `app.state.perft_registry` says what there is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            return await self._app(scope, receive, send)
        body = await _read_body(receive)
        try:
            registry: Registry = scope["app"].state.perft_registry
            model = _model_of(body)
            if model is not None:
                registry.resolve(model)
        except ApiError as error:
            return await JSONResponse(error.body(), error.status)(scope, receive, send)
        await self._app(scope, _replay(body, receive), send)


def _is_json(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").split(";")[0].strip().lower() == "application/json"


async def _read_body(receive: Receive) -> bytes:
    """The whole body (what arrived of it, if the client went away)."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return bytes(body)


def _model_of(body: bytes) -> str | None:
    """The request's `model`, None if there is none to look at (vLLM says what is wrong with the rest)."""
    try:
        values: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = values.get("model") if isinstance(values, dict) else None
    return model if isinstance(model, str) else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then goes on with the connection."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message
