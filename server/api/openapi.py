"""Owns what the OpenAPI document says of the routes beyond what FastAPI reads from their signatures.

Invariant: a status is documented exactly where a route can answer it.
"""

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from adapters.names import NAME_PATTERN
from server.api.error_responses import ContractRoute
from server.api.route_table import LOADING_ROUTES, ROUTES, Route
from server.api.schemas import AdapterObject, AnthropicErrorObject, ErrorObject, UploadedAdapter

ERRORS = {
    400: "invalid_request: a parameter or the body is invalid; `param` names it",
    401: "invalid_api_key: no key, or a wrong one",
    403: "forbidden: a key without the right, or a page of another origin",
    404: "model_not_found, adapter_not_found or version_not_found, also for what this key may not see; not_found",
    405: "method_not_allowed",
    408: "upload_timeout or request_timeout: the body came too slowly",
    409: "name_conflict, version_active, active_changed or device_full",
    410: "adapter_deleted: while the request waited or ran",
    413: "adapter_too_large, or request_too_large",
    415: "unsupported_encoding",
    429: "quota_exceeded or rate_limited",
    500: "internal_error or adapter_output_invalid",
    503: "engine_unavailable or adapter_unavailable",
    507: "storage_full",
}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait before a retry", "schema": {"type": "integer"}}}

_KEY_IS = "an API key or the admin key"
_ARCHIVE = ".zip or .tar.gz with both files in one folder of it; what else it has is ignored"
_FILE = {"type": "string", "format": "binary"}
_NAME = {"type": "string", "pattern": f"^{NAME_PATTERN}$", "description": "the adapter's name"}
_ACTIVATE = {
    "type": "string",
    "enum": ["true", "false"],
    "default": "true",
    "description": "whether the bare name selects the new version from now on; 1, yes, on, 0, no and off count too",
}
_ALLOWED_KEYS = {
    "type": "string",
    "minLength": 1,
    "description": "labels of keys that may select the adapter, as a JSON list or separated by commas; null: all; []: "
    "none; not given: as the name has it, or had it before it was deleted",
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
                        "file": _FILE | {"description": _ARCHIVE},
                        "activate": _ACTIVATE,
                        "allowed_keys": _ALLOWED_KEYS,
                    },
                }
            }
        },
    }
}
_TEXT = {"schema": {"type": "string"}}
_LOCATION = {
    "Location": _TEXT | {"description": "the path of the version of the content that was uploaded"},
}
UPLOADED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": UploadedAdapter | AdapterObject,
        "description": "The content is already a version",
        "headers": _LOCATION,
    },
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
    },
    304: {"description": "`If-None-Match` names the content: the client has it", "headers": {"ETag": _TEXT}},
}
SAID: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
_PATCH_RULES = {"minProperties": 1, "dependentRequired": {"if_active": ["active"]}}
PATCH_BODY: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": _PATCH_RULES}}}}


async def _key(
    bearer: Annotated[Any, Security(HTTPBearer(auto_error=False, scheme_name="key", description=_KEY_IS))],
    header: Annotated[Any, Security(APIKeyHeader(name="x-api-key", auto_error=False, scheme_name="x-api-key"))],
) -> None:
    """Documents the two headers that a key may be in; access control reads them."""


KEY = Depends(_key)
"""Documents that a route needs a key."""
SECURITY: list[dict[str, list[str]]] = [{"key": []}, {"x-api-key": []}]
ACCESS_ERRORS = (401, 403, 429)
"""What access control, in front of every route, may answer."""
INFERENCE_ERRORS = (400, 401, 403, 404, 408, 410, 413, 415, 429, 500, 503)
"""What a route that selects a model may answer."""
SUMMARY = "A Mixture-of-Experts base model and its PERFT adapters, selected by name"


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with the error `statuses`."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        documented[status] = {"model": ErrorObject, "description": ERRORS[status]}
        if status in (429, 503):
            documented[status]["headers"] = RETRY_AFTER
    return documented


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` say what this server is, and what its routes really answer: FastAPI documents a 422 for
    every route, and vLLM's document errors of vLLM's and no key."""
    whole = app.openapi
    app.title, app.version, app.summary = "perft-server", version("perft-server"), SUMMARY

    def openapi() -> dict[str, Any]:
        is_made = app.openapi_schema is None
        document = whole()
        if is_made:
            ours = {(method, r.path) for r in app.routes if isinstance(r, ContractRoute) for method in r.methods}
            for route in ROUTES + LOADING_ROUTES:
                operation = document["paths"].get(route.path.replace(":path", ""), {}).get(route.method.lower())
                if operation is not None:
                    operation["responses"].pop("422", None)
                    if (route.method, route.path) not in ours:
                        _describe_vllms(operation, route)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (ErrorObject, AnthropicErrorObject):
                made = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= made.pop("$defs", {}) | {model.__name__: made}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_vllms(operation: dict[str, Any], route: Route) -> None:
    """Document the key and the errors of a route of vLLM's."""
    if route.need != "none":
        operation["security"] = SECURITY
    responses = {status: said for status, said in operation["responses"].items() if int(status) < 400}
    if route.selects_model:
        name = (AnthropicErrorObject if route.dialect == "anthropic" else ErrorObject).__name__
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        for status in INFERENCE_ERRORS:
            responses[str(status)] = {"description": ERRORS[status], "content": content}
            if status in (429, 503):
                responses[str(status)]["headers"] = RETRY_AFTER
    operation["responses"] = responses
