"""Owns how our routes refuse: every error leaves as OpenAI's error object with a code of API.md.

Invariant: it happens inside the route itself, so no exception handler of the app it hangs in (vLLM registers some for
HTTPException, RequestValidationError and Exception) can answer in another form.
"""

import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive

from adapters.errors import StorageFullError
from server.errors import ApiError

MAX_JSON_BYTES = 256 * 1024
PATH_CODES = {"name": "adapter_not_found", "version": "version_not_found", "file": "not_found"}

logger = logging.getLogger(__name__)


class ContractRoute(APIRoute):
    """A route whose errors are all ApiErrors on the wire; its JSON body, if it has one, is bounded."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                if self.body_field is not None:
                    request = Request(request.scope, _bounded(request.receive))
                return await handler(request)
            except Exception as error:
                return as_api_error(error).response()

        return answer


def as_api_error(error: Exception) -> ApiError:
    """What a route answers when its handler raised `error`; an unforeseen one is logged and keeps its words here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid_request(error.errors())
    if isinstance(error, HTTPException):
        cause = error.__cause__
        return cause if isinstance(cause, ApiError) else ApiError(error.status_code, "invalid_request", error.detail)
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "invalid_request", "the client went away before its body was complete")
    if isinstance(error, StorageFullError):
        return ApiError(507, "storage_full", str(error))
    logger.error("a route failed", exc_info=error)
    return ApiError(500, "internal_error", f"the server failed ({type(error).__name__}); its log says why")


def _invalid_request(errors: Sequence[Any]) -> ApiError:
    """404 for a path that can name nothing, 400 with everything that is wrong otherwise."""
    for error in errors:
        where, *rest = error["loc"]
        if where == "path" and rest and rest[0] in PATH_CODES:
            return ApiError(404, PATH_CODES[rest[0]], f"found {_short(error['input'])} in the path: {error['msg']}")
    described = [f"{_where(error) or 'body'}: {_problem(error)}" for error in errors[:10]]
    return ApiError(400, "invalid_request", "; ".join(described), _where(errors[0]))


def _where(error: Any) -> str | None:
    """The parameter that an error is about; None for the body as a whole."""
    if error["type"] == "json_invalid":
        return None
    named = ".".join(str(part) for part in error["loc"][1:])
    return (ascii(named)[1:-1])[:100] or None


def _problem(error: Any) -> str:
    if error["type"] == "json_invalid":
        return f"not JSON ({error['ctx']['error']})"
    if error["type"] == "extra_forbidden":
        return "unknown here, remove it"
    if error["type"] == "missing":
        return "missing"
    return f"found {_short(error['input'])}; {error['msg'][:1].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bounded(receive: Receive) -> Receive:
    """`receive` that refuses a body over MAX_JSON_BYTES while it arrives."""
    received = 0

    async def next_message() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_JSON_BYTES:
            raise ApiError(400, "invalid_request", f"found a body over {MAX_JSON_BYTES} bytes, expected a smaller one")
        return message

    return next_message
