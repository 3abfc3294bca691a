"""Owns the pages of the list of adapters: what is in one, and in which order.

Invariant: what a caller may not see of an adapter (registry.version_view) has no part in its order either. A page costs
what it shows: what is looked at of the other adapters is cheap, however many versions they have.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from server.auth.keys import Caller
from server.registry.registry import Registry
from server.registry.version import AdapterView, Version
from server.residency.state import Tier

Order = Literal["name", "rows", "running", "last_used", "created"]
_UNKNOWN, _INACTIVE = 1 << 62, 1 << 63
"""The keys of what has no value that the caller may see, and of what has no active version: behind every value."""


@dataclass(frozen=True)
class ListQuery:
    """Which adapters. search: in the name or the active version's description, in any case. resident: of the active
    version. after: names behind this one, by name; offset: how many to leave out in front. limit: None for all."""

    search: str = ""
    resident: Tier | None = None
    order: Order = "name"
    is_descending: bool = False
    after: str = ""
    offset: int = 0
    limit: int | None = None
    active_only: bool = False


@dataclass(frozen=True)
class ListPage:
    """What the query selects of the adapters that the caller may see. total: without `after`, `offset` and `limit`."""

    data: list[AdapterView]
    has_more: bool
    total: int


def list_adapters(registry: Registry, caller: Caller, query: ListQuery) -> ListPage:
    """The page. Only its views are built."""
    names = registry.visible_names(caller)
    if query.search:
        wanted = query.search.casefold()
        active = registry.active_of(names)
        names = [name for name, v in zip(names, active, strict=True) if wanted in (v.searched if v else name)]
    if query.resident is not None:
        names = _resident(registry, names, query.resident)
    total = len(names)
    if query.after:
        names = names[bisect_right(names, query.after) :]
    if query.order != "name":
        names = _ordered(registry, caller, names, query.order, -1 if query.is_descending else 1)
    elif query.is_descending:
        names.reverse()
    end = len(names) if query.limit is None else query.offset + query.limit
    data = [registry.view(name, caller, query.active_only) for name in names[query.offset : end]]
    return ListPage(data, has_more=end < len(names), total=total)


def _resident(registry: Registry, names: list[str], tier: Tier) -> list[str]:
    tiers = registry.loaded()
    active = registry.active_of(names)
    return [
        name
        for name, version in zip(names, active, strict=True)
        if version is not None and tiers.get(version.ref.key, "disk") == tier
    ]


def _ordered(registry: Registry, caller: Caller, names: list[str], order: Order, sign: int) -> list[str]:
    """The names by a value of their active versions; those of the same value stay as they are."""
    value = _VALUES[order]
    keys: list[int] = []
    for version in registry.active_of(names):
        found = _INACTIVE if version is None else value(version)
        keys.append(_UNKNOWN if found is None else found if found is _INACTIVE else sign * found)
    if order in ("running", "last_used") and not (caller.is_admin or caller.label is None):
        for at, name in enumerate(names):
            if keys[at] is not _INACTIVE and not registry.sees_use(name, caller):
                keys[at] = _UNKNOWN
    return [names[at] for at in sorted(range(len(names)), key=keys.__getitem__)]


_VALUES: dict[Order, Callable[[Version], int | None]] = {
    "rows": attrgetter("rows"),
    "running": attrgetter("requests_running"),
    "last_used": attrgetter("last_used"),
    "created": attrgetter("record.created"),
}
