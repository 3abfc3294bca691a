"""Owns the errors of this package and their form on the wire (OpenAI's error object).

Exception
├── StartError          the server refuses to start; the message is the reason, the command exits with 1
└── ApiError            a request is refused; carries status, code and message
    └── ModelNotFound   404 model_not_found
"""

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse


class StartError(Exception):
    """The server refuses to start."""


class ApiError(Exception):
    """A request is refused with `status`; `code` is one of API.md's table.

    violations: every broken rule of the format, for invalid_adapter. retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        violations: Sequence[str] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.violations, self.retry_after = violations, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.violations is not None:
            error["violations"] = list(self.violations)
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def response(self) -> JSONResponse:
        """The answer itself."""
        return JSONResponse(self.body(), self.status, self.headers())


class ModelNotFound(ApiError):  # noqa: N818 (named as the code on the wire)
    """No model, adapter or version of that name is served here."""

    def __init__(self, model: str) -> None:
        shown = model if len(model) <= 100 else model[:97] + "..."
        message = f"found no model named {shown!r} here; GET /v1/models lists the base and the adapters"
        super().__init__(404, "model_not_found", message, "model")
