"""Owns the HTTP response to every error: one object in the dialect of its route, with its status (docs/api.md).

Invariant: every error leaves our routes through `as_api_error`, inside the route itself, so that no exception handler
of the app around it (vLLM registers some) can answer in another form.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope

from adapters import errors as adapters
from server import errors
from server.api.route_table import Dialect, dialect_of
from server.api.translation.fields import field_problems, problem_in_path
from server.bodies.receive import check_json

MAX_JSON_BYTES = 256 * 1024
MAX_MESSAGE_LENGTH = 1000
"""Characters. What a message quotes is bounded where it is quoted; this bounds what others wrote."""
ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 410: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
"""Anthropic's type of an error by its status; else invalid_request_error below 500 and api_error from there on."""
TOO_LONG = errors.ContextLengthError.code
NEVER_RETRIED = frozenset(
    {
        *("adapter_output_invalid", "quota_exceeded", "storage_full"),
        *("active_changed", "version_active", "name_conflict", "device_full"),
    }
)
"""Codes of a status that OpenAI's clients retry, where the same request fails again."""
PATH_CODES = {"name": "adapter_not_found", "version": "version_not_found", "file": "not_found"}

logger = logging.getLogger(__name__)


class ErrorRow(NamedTuple):
    """One row of the table. param: the caller's field, unless the error names it. retry_after_s: likewise."""

    status: int
    param: str | None = None
    retry_after_s: int | None = None


ERROR_TABLE: dict[type[Exception], ErrorRow] = {
    errors.InvalidRequestError: ErrorRow(400),
    errors.ContextLengthError: ErrorRow(400),
    errors.RequestTooLargeError: ErrorRow(413),
    errors.UnsupportedEncodingError: ErrorRow(415, "Content-Encoding"),
    errors.EngineUnavailableError: ErrorRow(503, retry_after_s=5),
    errors.StoreUnreachableError: ErrorRow(503, retry_after_s=5),
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
    errors.QuotaExceededError: ErrorRow(429),  # waiting does not help
    errors.SourceNotFoundError: ErrorRow(404),
    errors.AuditLogError: ErrorRow(507),
    errors.AdapterUnavailableError: ErrorRow(503),
    errors.AdapterDeletedError: ErrorRow(410, "model"),
    errors.AdapterOutputInvalidError: ErrorRow(500, "model"),
    errors.DeviceFullError: ErrorRow(409),
    errors.UrlTooLongError: ErrorRow(414),
    errors.HeadersTooLargeError: ErrorRow(431),
    errors.RequestTimeoutError: ErrorRow(408),
    errors.TooManyConnectionsError: ErrorRow(503),
    errors.MalformedUploadError: ErrorRow(400),
    errors.InvalidUploadError: ErrorRow(400),
    errors.InvalidUploadNameError: ErrorRow(400, "name"),
    errors.UploadTooLargeError: ErrorRow(413),
    errors.UploadEncodingError: ErrorRow(415, "Content-Encoding"),
    errors.UploadTimeoutError: ErrorRow(408),
    errors.UploadStorageFullError: ErrorRow(507),
    adapters.InvalidAdapterError: ErrorRow(400),
    adapters.StorageFullError: ErrorRow(507),
    adapters.StoreError: ErrorRow(503, retry_after_s=60),
}
"""Each error carries its `code`; the most specific class of an error counts."""
ABOUT_ADAPTER = (errors.AdapterUnavailableError, errors.DeviceFullError)
"""Errors about the adapter that a field of the request names, whichever that is."""


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
        if self.code == TOO_LONG and TOO_LONG not in self.message:
            self.message += f" ({TOO_LONG})"  # some clients look for it in the words
        super().__init__(self.message)

    def body(self, dialect: Dialect = "openai", request_id: str | None = None) -> dict[str, Any]:
        """The error object of the dialect: OpenAI's, or Anthropic's with our code and param as well."""
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            detail = {"type": kind, "message": self.message, "param": self.param, "code": self.code}
            return {"type": "error", "error": detail, "request_id": request_id}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.violations is not None:
            error["violations"] = list(self.violations)
        return {"error": error}

    def response(self, dialect: Dialect = "openai", request_id: str | None = None) -> JSONResponse:
        """The response itself."""
        headers = {"X-Content-Type-Options": "nosniff"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.code in NEVER_RETRIED:
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.closes:
            headers["Connection"] = "close"
        return JSONResponse(self.body(dialect, request_id), self.status, headers)

    def event(self, dialect: Dialect, request_id: str | None = None, sequence_number: int = 0) -> bytes:
        """The last event of a stream that fails. sequence_number: of /v1/responses, which counts its events."""
        body = self.body(dialect, request_id)
        if dialect == "responses":
            flat = {"code": self.code, "message": self.message, "param": self.param}
            body = {"type": "error", "sequence_number": sequence_number, **flat, **body}
        name = b"" if dialect == "openai" else b"event: error\n"
        return name + b"data: " + json.dumps(body).encode() + b"\n\n"

    def http11(self, request_id: str, dialect: Dialect = "openai") -> bytes:
        """A whole HTTP/1.1 response that closes its connection, for an error below ASGI."""
        response = self.response(dialect, request_id)
        response.headers.update({"X-Request-Id": request_id, "Connection": "close"})
        head = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n".encode()
        lines = (name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        return head + b"".join(lines) + b"\r\n" + bytes(response.body)


def error_response(error: Exception, scope: Scope, field: str | None = None) -> JSONResponse:
    """The response to an error of a request, in the dialect of its route. field: see `as_api_error`."""
    request_id = scope.get("state", {}).get("request_id")
    return as_api_error(error, request_id, field).response(dialect_of(scope), request_id)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """An exception handler for a body that does not fit its model, on vLLM's routes; the sender around them
    (middleware/stream_errors) gives it the dialect."""
    return as_api_error(error).response()


class ContractRoute(APIRoute):
    """A route whose errors all leave as ApiErrors; its JSON body, if it has one, is bounded and has no key twice."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        known = tuple(getattr(self.body_field and self.body_field.field_info.annotation, "model_fields", ()))

        async def answer(request: Request) -> Response:
            try:
                if self.body_field is not None:
                    headers = MutableHeaders(scope=request.scope)
                    check_json(headers.get("content-type"))
                    headers["content-type"] = "application/json"  # a request without a type is meant so
                    request = _StrictRequest(request.scope, _bounded(request.receive))
                return await handler(request)
            except Exception as error:
                request_id = request.scope.get("state", {}).get("request_id")
                shown = as_api_error(error, request_id, known=known)
                if shown.status >= 500 and shown.code != "internal_error":  # that one is logged already
                    logger.warning("request %s failed: %s", request_id, shown.message)
                return shown.response(dialect_of(request.scope), request_id)

        return answer


def as_api_error(
    error: Exception, request_id: str | None = None, field: str | None = None, known: Sequence[str] = ()
) -> ApiError:
    """The response to `error`. An unforeseen error is logged; its message stays in the log.

    field: the caller's field that names the adapter, for an error about it where neither error nor table names one.
    known: the fields that the body may have, for a hint about one that it may not.
    """
    if isinstance(error, ApiError):
        return error
    if (kind := next((kind for kind in type(error).__mro__ if kind in ERROR_TABLE), None)) is not None:
        return _from_table(error, kind, field)
    if isinstance(error, RequestValidationError):
        return _invalid_request(error, known)
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
        param=getattr(error, "param", None) or row.param or (field if issubclass(kind, ABOUT_ADAPTER) else None),
        violations=violations,
        retry_after_s=row.retry_after_s if retry_after_s is None else retry_after_s,
        closes=isinstance(error, errors.UploadError | errors.ConnectionLimitError),
    )


def _format_message(violations: Sequence[str]) -> str:
    first = violations[0] if violations else "unreadable"
    more = f" (and {len(violations) - 1} more; `violations` lists them all)" if len(violations) > 1 else ""
    return f"the adapter was rejected: {first}{more}"


def _invalid_request(error: RequestValidationError, known: Sequence[str]) -> ApiError:
    """404 for a path that can name nothing, 400 with what is wrong otherwise."""
    found = [one for one in error.errors() if isinstance(one, dict)]
    if not found:  # vLLM raises it with words alone
        return ApiError(400, "invalid_request", bounded("; ".join(map(str, error.errors())) or "not valid"))
    for one in found:
        where, *rest = one["loc"]
        if where == "path" and rest and rest[0] in PATH_CODES:
            return ApiError(404, PATH_CODES[rest[0]], problem_in_path(one))
    problems = field_problems(found, error.body, known)
    described = "; ".join(f"{field or 'body'}: {problem}" for field, problem in problems.items())
    return ApiError(400, "invalid_request", bounded(described), next(iter(problems)))


def bounded(message: str) -> str:
    """A message of bounded length."""
    return message if len(message) <= MAX_MESSAGE_LENGTH else message[: MAX_MESSAGE_LENGTH - 3] + "..."


class _StrictRequest(Request):
    """A request whose JSON has no duplicate key: it is not known which of the two is meant."""

    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = ascii(next(key for key, count in counts.items() if count > 1))[1:-1][:100]
        raise ApiError(400, "invalid_request", f"found the key {key!r} more than once, expected it once", key)
    return values


def _bounded(receive: Receive) -> Receive:
    """`receive` that rejects a body over MAX_JSON_BYTES while it arrives."""
    received = 0

    async def next_message() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_JSON_BYTES:
            found = f"found a body over {MAX_JSON_BYTES} bytes, expected a smaller one"
            raise ApiError(413, "request_too_large", found, closes=True)
        return message

    return next_message
