"""Owns what the path of a request means and how it is shown in the log, and which ID the request has.

Invariant: a request has one path, in which slashes count once; the rules of access and the app see that one.
"""

import re
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Scope

SHOWN_LENGTH = 200
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_SHOWN_PARTS = 20
_SLASHES = re.compile("/{2,}")
_MODEL = re.compile("(?P<list>.*?(?<!/)/+v1/+models)/(?P<model>/*[^/].*)", re.DOTALL)
"""A model's name may hold slashes, also at its ends, so it stays as it is: `retrieve_model` finds what it means."""


def request_id_of(headers: Headers) -> str:
    """The request's own ID, if it can stand in a line of the log, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def one_path(scope: Scope) -> dict[str, str | bytes]:
    """`path` and `raw_path` of the request's scope, with doubled slashes as one and none at the end
    (but at that of the root)."""
    path: str = scope["path"]
    found = _without_slashes(path)
    if found == scope.get("root_path"):
        found += "/"  # the page at the root, below the prefix of a proxy
    if found == path:
        return {}
    return {"path": found, "raw_path": quote(found, safe="/:@!$&'()*+,;=~", errors="replace").encode("ascii")}


def _without_slashes(path: str) -> str:
    if not path.startswith("/"):
        return path
    if (found := _MODEL.fullmatch(path)) is not None:
        return f"{_SLASHES.sub('/', found['list'])}/{found['model']}"
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def shown_path(path: str, is_secret: Callable[[str], bool]) -> str:
    """A path that is no route's, as the log shows it: bounded, in one line, and without a key that it may hold."""
    parts = path.split("/", MAX_SHOWN_PARTS)
    if len(parts) > MAX_SHOWN_PARTS:
        parts[-1] = "..."
    text = quote("/".join("***" if is_secret(part) else part for part in parts), safe="/*@:+,;=~", errors="replace")
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 3] + "..."
