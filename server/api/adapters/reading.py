"""Owns the routes that say what adapters there are: the list, one adapter, one version."""

from collections.abc import Generator
from typing import Annotated, Literal, TypeVar, get_args

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.names import NAME_PATTERN
from server.api.adapters.parameters import NO_QUERY, Name, Number, adapter_routes, as_object
from server.api.dependencies import CallerOf, RegistryOf, Services, ServicesOf
from server.api.openapi import ACCESS_ERRORS, errors_of
from server.api.schemas import AdapterList, AdapterObject, Tier, VersionObject
from server.auth.keys import Caller
from server.errors import InvalidRequestError
from server.registry.listing.page import ListQuery, Order, list_adapters
from server.sharing.turns import Turns

router = adapter_routes()

T = TypeVar("T")
Sorting = Literal[
    "name", "rows", "running", "last_used", "created", "-name", "-rows", "-running", "-last_used", "-created"
]
_ORDERS: dict[str, Order] = {f"{sign}{order}": order for sign in ("", "-") for order in get_args(Order)}


class Page(BaseModel):
    """Which adapters, in which order, and which part of them."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="the most adapters to return")
    after: str | None = Field(
        None, pattern=f"^{NAME_PATTERN}$", description="only names after this one: a page's `next`; of a list by name"
    )
    offset: int = Field(0, ge=0, le=2**31, description="how many adapters to leave out in front; not with `after`")
    search: str = Field(
        "",
        max_length=200,
        description="only adapters with this in their name or in the active version's description, in any case",
    )
    resident: Tier | None = Field(None, description="only adapters whose active version is there")
    sort: Sorting = Field(
        "name",
        description="of the active version; `-` in front: descending. Adapters of the same value are by name, those "
        "without a value, or without an active version, come last",
    )
    versions: Literal["all", "active"] = Field(
        "all", description="which versions each adapter has: all, or the active one alone (the newest where none is)"
    )


@router.get(
    "/v1/adapters", summary="List adapters", response_model=AdapterList, responses=errors_of(*ACCESS_ERRORS, 400)
)
async def get_adapters(
    page: Annotated[Page, Query()], caller: CallerOf, registry: RegistryOf, services: ServicesOf
) -> Response:
    """The adapters that this key may see. What use changes of them (tier, requests, last use) may be a second old."""
    if page.after is not None and (page.offset or page.sort != "name"):
        reason = "one of them" if page.offset else "after only in a list by name; use offset for the next page"
        message = f"found after with {'offset' if page.offset else 'sort'}, expected {reason}"
        raise InvalidRequestError(message, param="after")
    query = ListQuery(
        search=page.search,
        resident=page.resident,
        order=_ORDERS[page.sort],
        is_descending=page.sort.startswith("-"),
        after=page.after or "",
        offset=page.offset,
        limit=page.limit,
        active_only=page.versions == "active",
    )
    key = caller, query, registry.changes
    content = await services.lists.result(key, lambda: _list(query, caller, services))
    return Response(content, media_type="application/json")


async def _list(query: ListQuery, caller: Caller, services: Services) -> bytes:
    """The body of the answer."""
    found = await _in_turns(list_adapters(services.registry, caller, query), services.list_turns)
    is_by_name = query.order == "name" and not query.is_descending
    next_name = found.data[-1].name if found.has_more and is_by_name else None
    data = [as_object(adapter) for adapter in found.data]
    content = AdapterList(data=data, has_more=found.has_more, next=next_name, total=found.total)
    return content.model_dump_json().encode()


async def _in_turns(work: Generator[None, None, T], turns: Turns) -> T:
    """What the work returns; each of its steps waits for its turn on the event loop."""
    while True:
        await turns.step()
        try:
            next(work)
        except StopIteration as done:
            result: T = done.value
            return result


@router.get(
    "/v1/adapters/{name}",
    summary="One adapter",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_adapter(name: Name, caller: CallerOf, registry: RegistryOf) -> AdapterObject:
    """The adapter with its versions."""
    return as_object(registry.adapter(name, caller))


@router.get(
    "/v1/adapters/{name}/versions/{version}",
    summary="One version",
    dependencies=[NO_QUERY],
    responses=errors_of(*ACCESS_ERRORS, 400, 404),
)
async def get_version(name: Name, number: Number, caller: CallerOf, registry: RegistryOf) -> VersionObject:
    """One version of the adapter."""
    return VersionObject.model_validate(registry.version_view(registry.version(name, number, caller), caller))
