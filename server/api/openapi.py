"""Owns what the OpenAPI document says of our routes beyond what FastAPI reads from their signatures.

Invariant: a status is documented exactly where a route can answer it.
"""

from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from adapters.names import NAME_PATTERN
from server.api.error_responses import ContractRoute
from server.api.schemas import AdapterObject, ErrorObject

ERRORS = {
    400: "invalid_request: a parameter or the body is invalid; `param` names it",
    401: "invalid_api_key: no key, or a wrong one",
    403: "forbidden: a key without the right, or a page of another origin",
    404: "model_not_found, adapter_not_found or version_not_found: also for what this key may not see",
    405: "method_not_allowed",
    408: "upload_timeout: the body came too slowly",
    409: "name_conflict, version_active, active_changed or device_full",
    413: "adapter_too_large",
    429: "quota_exceeded or rate_limited",
    503: "engine_unavailable or adapter_unavailable",
    507: "storage_full",
}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait before a retry", "schema": {"type": "integer"}}}

_FILE = {"type": "string", "format": "binary"}
_NAME = {"type": "string", "pattern": f"^{NAME_PATTERN}$", "description": "the adapter's name"}
_ACTIVATE = {
    "type": "string",
    "enum": ["true", "false"],
    "default": "true",
    "description": "whether the bare name selects the new version from now on",
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The name, and either `config` and `weights` or the archive `file` of both",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "oneOf": [{"required": ["config", "weights"]}, {"required": ["file"]}],
                    "dependentRequired": {"config": ["weights"], "weights": ["config"]},
                    "additionalProperties": False,
                    "properties": {
                        "name": _NAME,
                        "config": _FILE | {"description": "adapter_config.json"},
                        "weights": _FILE | {"description": "adapter_model.safetensors"},
                        "file": _FILE | {"description": ".zip or .tar.gz with both files at its root"},
                        "activate": _ACTIVATE,
                    },
                }
            }
        },
    }
}
_TEXT = {"schema": {"type": "string"}}
_LOCATION = {"Location": _TEXT | {"description": "the adapter's path"}}
UPLOADED: dict[int | str, dict[str, Any]] = {
    200: {"model": AdapterObject, "description": "The content is already a version", "headers": _LOCATION},
    201: {"description": "The adapter with its new version", "headers": _LOCATION},
}
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
_PATCH_RULES = {"minProperties": 1, "dependentRequired": {"if_active": ["active"]}}
PATCH_BODY: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": _PATCH_RULES}}}}


KEY = Security(HTTPBearer(auto_error=False, scheme_name="key", description="an API key or the admin key"))
"""Documents that a route needs a key."""
ACCESS_ERRORS = (401, 403, 429)
"""What access control, in front of every route, may answer."""


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with the error `statuses`."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        documented[status] = {"model": ErrorObject, "description": ERRORS[status]}
        if status in (429, 503):
            documented[status]["headers"] = RETRY_AFTER
    return documented


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` leave out the 422 that FastAPI documents for every route: ours answer 400 or 404 instead."""
    whole = app.openapi

    def openapi() -> dict[str, Any]:
        document = whole()
        for route in app.routes:
            if isinstance(route, ContractRoute) and route.include_in_schema:
                for method in route.methods:
                    document["paths"][route.path_format][method.lower()]["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
