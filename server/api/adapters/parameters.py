"""Owns what several routes of adapters take, checked, and the object that they answer with."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BeforeValidator

from adapters.names import NAME_PATTERN
from adapters.store import AdapterRecord
from server.api.error_responses import ContractRoute
from server.api.openapi import KEY
from server.api.schemas import AdapterObject
from server.errors import InvalidRequestError
from server.registry.version import AdapterView


def adapter_routes() -> APIRouter:
    """A router for some of the routes."""
    return APIRouter(route_class=ContractRoute, tags=["adapters"], dependencies=[KEY])


def _whole_number(value: object) -> object:
    """One spelling per version: no sign, no leading zero, no white space."""
    if not (isinstance(value, str) and value.isascii() and value.isdigit() and not value.startswith("0")):
        raise ValueError("a version is a number from 1")
    return value


Name = Annotated[str, Path(pattern=f"^{NAME_PATTERN}$", description="the adapter's name")]
Number = Annotated[int, Path(ge=1, lt=2**31, alias="version"), BeforeValidator(_whole_number)]


async def _no_query(request: Request) -> None:
    """`DELETE /v1/adapters/poet?version=2` must not delete all of poet. Raises InvalidRequestError."""
    for parameter in request.query_params:
        shown = ascii(parameter)[1:-1][:100]
        message = f"found the query parameter {shown!r}, expected none: a version is part of the path"
        raise InvalidRequestError(message, param=shown)


NO_QUERY = Depends(_no_query)


def as_object(adapter: AdapterView) -> AdapterObject:
    return AdapterObject.model_validate(adapter)


def check_labels(labels: list[str], record: AdapterRecord | None, known: frozenset[str]) -> None:
    """Raises InvalidRequestError for a label of no key. One that the adapter has already stays: its key may be gone."""
    unknown = set(labels) - known - set((record.allowed_keys if record is not None else None) or ())
    if unknown:
        found, expected = ", ".join(map(repr, sorted(unknown))), ", ".join(sorted(known)) or "none: it has no API keys"
        message = f"found {found}, expected labels of this server's API keys ({expected})"
        raise InvalidRequestError(message, param="allowed_keys")
