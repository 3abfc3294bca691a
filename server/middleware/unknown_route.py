"""Owns what is said of a path that this server does not have: which one it was, and what its caller may have meant."""

import re

from starlette.types import Scope

from server.api.error_responses import ApiError
from server.api.route_table import routes_at

UNSERVED = frozenset(
    {
        *("embeddings", "files", "images", "audio", "moderations", "batches", "fine_tuning", "assistants", "threads"),
        *("vector_stores", "uploads", "realtime", "conversations", "evals", "containers", "videos"),
    }
)
"""What OpenAI has below /v1 and this server does not."""
_BELOW = re.compile(r"(?:/v1)*/([a-z_]{1,32})(?:/|\Z)")
_TWICE = re.compile(r"(?:/v1){2,}(?=/)")


def not_found(method: str, scope: Scope, shown: str) -> ApiError:
    """404 for a path that is not listed. shown: the path, for people."""
    path: str = scope["path"]
    path = path.removeprefix(scope.get("root_path", ""))
    return ApiError(404, "not_found", f"found no route {method[:16]} {shown}; {_advice(path)}")


def _advice(path: str) -> str:
    name = found[1] if (found := _BELOW.match(path)) else ""
    if name in UNSERVED:
        return f"this server does not serve OpenAI's /v1/{name}"
    once = _TWICE.sub("/v1", path)
    if once != path and routes_at(once):
        if once.startswith("/v1/messages"):
            return "the path has /v1 twice: the base_url of Anthropic's clients ends without /v1"
        return "the path has /v1 twice: OpenAI's clients add none to their base_url, which ends in /v1 once"
    if not path.startswith("/v1/") and routes_at("/v1" + path):
        return "the path lacks /v1: the base_url ends in /v1 (of Anthropic's clients it does not)"
    if path.startswith("/v1/responses/"):
        return "responses are not stored by this server"
    return "GET /openapi.json lists the routes of this server"
