"""Owns the HTTP response to every error: OpenAI's error object with a status, a code and a `param` (docs/api.md).

Invariant: every error leaves our routes through `as_api_error`, inside the route itself, so that no exception handler
of the app around it (vLLM registers some) can answer in another form.
"""

import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive

from adapters import errors as adapters
from server import errors

MAX_JSON_BYTES = 256 * 1024
PATH_CODES = {"name": "adapter_not_found", "version": "version_not_found", "file": "not_found"}

logger = logging.getLogger(__name__)


class ErrorRow(NamedTuple):
    """One row of the table. param: the caller's field, unless the error names it. retry_after_s: likewise."""

    status: int
    param: str | None = None
    retry_after_s: int | None = None


ERROR_TABLE: dict[type[Exception], ErrorRow] = {
    errors.InvalidRequestError: ErrorRow(400),
    errors.EngineUnavailableError: ErrorRow(503),
    errors.InvalidKeyError: ErrorRow(401),
    errors.ForbiddenError: ErrorRow(403),
    errors.RateLimitedError: ErrorRow(429),
    errors.ModelNotFoundError: ErrorRow(404, "model"),
    errors.AdapterNotFoundError: ErrorRow(404, "name"),
    errors.VersionNotFoundError: ErrorRow(404, "version"),
    errors.InvalidNameError: ErrorRow(400, "name"),
    errors.NameConflictError: ErrorRow(409, "name"),
    errors.ActiveChangedError: ErrorRow(409, "if_active"),
    errors.VersionActiveError: ErrorRow(409, "version"),
    errors.QuotaExceededError: ErrorRow(429, retry_after_s=60),
    errors.AuditLogError: ErrorRow(507),
    errors.AdapterUnavailableError: ErrorRow(503),
    errors.AdapterDeletedError: ErrorRow(410, "model"),
    errors.AdapterOutputInvalidError: ErrorRow(500, "model"),
    errors.DeviceFullError: ErrorRow(409),
    errors.MalformedUploadError: ErrorRow(400),
    errors.InvalidUploadError: ErrorRow(400),
    errors.InvalidUploadNameError: ErrorRow(400, "name"),
    errors.UploadTooLargeError: ErrorRow(413),
    errors.UploadTimeoutError: ErrorRow(408),
    errors.UploadStorageFullError: ErrorRow(507),
    adapters.InvalidAdapterError: ErrorRow(400),
    adapters.StorageFullError: ErrorRow(507),
    adapters.StoreError: ErrorRow(503, retry_after_s=60),
}
"""Each error carries its `code`; the most specific class of an error counts."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error response. violations: every broken rule of the format, for invalid_adapter.

    retry_after_s: seconds. closes: whether the connection is closed, because more of the body may be coming.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    violations: Sequence[str] | None = None
    retry_after_s: int | None = None
    closes: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.violations is not None:
            error["violations"] = list(self.violations)
        return {"error": error}

    def response(self) -> JSONResponse:
        """The response itself."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.closes:
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


class ContractRoute(APIRoute):
    """A route whose errors all leave as ApiErrors; its JSON body, if it has one, is bounded."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                if self.body_field is not None:
                    request = Request(request.scope, _bounded(request.receive))
                return await handler(request)
            except Exception as error:
                request_id = request.scope.get("state", {}).get("request_id")
                shown = as_api_error(error, request_id)
                if shown.status >= 500 and shown.code != "internal_error":  # that one is logged already
                    logger.warning("request %s failed: %s", request_id, shown.message)
                return shown.response()

        return answer


def as_api_error(error: Exception, request_id: str | None = None, field: str | None = None) -> ApiError:
    """The response to `error`. An unforeseen error is logged; its message stays in the log.

    field: the caller's field that the request as a whole is about, where neither error nor table names one.
    """
    if isinstance(error, ApiError):
        return error
    if (kind := next((kind for kind in type(error).__mro__ if kind in ERROR_TABLE), None)) is not None:
        return _from_table(error, kind, field)
    if isinstance(error, RequestValidationError):
        return _invalid_request(error.errors())
    if isinstance(error, HTTPException):
        cause = error.__cause__
        return cause if isinstance(cause, ApiError) else ApiError(error.status_code, "invalid_request", error.detail)
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "invalid_request", "the client went away before its body was complete")
    logger.error("request %s failed", request_id or "(no ID)", exc_info=error)
    return internal_error(request_id)


def internal_error(request_id: str | None) -> ApiError:
    """500, for an unforeseen error."""
    where = f" for request ID {request_id}" if request_id else ""
    return ApiError(500, "internal_error", f"internal error; see the server log{where}")


def _from_table(error: Exception, kind: type[Exception], field: str | None) -> ApiError:
    row = ERROR_TABLE[kind]
    violations: Sequence[str] | None = getattr(error, "violations", None)
    retry_after_s: int | None = getattr(error, "retry_after_s", None)
    return ApiError(
        status=row.status,
        code=kind.code,  # type: ignore[attr-defined]
        message=str(error) if violations is None else _format_message(violations),
        param=getattr(error, "param", None) or row.param or field,
        violations=violations,
        retry_after_s=row.retry_after_s if retry_after_s is None else retry_after_s,
        closes=isinstance(error, errors.UploadError),
    )


def _format_message(violations: Sequence[str]) -> str:
    first = violations[0] if violations else "unreadable"
    more = f" (and {len(violations) - 1} more; `violations` lists them all)" if len(violations) > 1 else ""
    return f"the adapter was rejected: {first}{more}"


def _invalid_request(found: Sequence[Any]) -> ApiError:
    """404 for a path that can name nothing, 400 with everything that is wrong otherwise."""
    for error in found:
        where, *rest = error["loc"]
        if where == "path" and rest and rest[0] in PATH_CODES:
            return ApiError(404, PATH_CODES[rest[0]], f"found {_short(error['input'])} in the path: {error['msg']}")
    described = [f"{_where(error) or 'body'}: {_problem(error)}" for error in found[:10]]
    return ApiError(400, "invalid_request", "; ".join(described), _where(found[0]))


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
        return "unknown field; remove it"
    if error["type"] == "missing":
        return "missing"
    return f"found {_short(error['input'])}; {error['msg'][:1].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bounded(receive: Receive) -> Receive:
    """`receive` that rejects a body over MAX_JSON_BYTES while it arrives."""
    received = 0

    async def next_message() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_JSON_BYTES:
            raise ApiError(400, "invalid_request", f"found a body over {MAX_JSON_BYTES} bytes, expected a smaller one")
        return message

    return next_message
