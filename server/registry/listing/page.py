"""Owns the pages of the list of adapters: what is in one, and in which order.

Invariant: what a caller may not see of an adapter (registry.version_view) has no part in its order either. A page costs
what it shows: what is looked at of the other adapters is cheap, however many versions they have. No step of the work
holds the event loop for much longer than STEP_S.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Generator
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from server.auth.keys import Caller
from server.registry.registry import Registry
from server.registry.version import BETWEEN, AdapterView, Version
from server.residency.state import Tier

STEP_S = 0.005
MOST_VERSIONS = 1000
"""Of a page, unless its first adapter alone has more: with many versions it ends before its limit."""
_LOOKED_AT_AT_ONCE = 16

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


def list_adapters(registry: Registry, caller: Caller, query: ListQuery) -> Generator[None, None, ListPage]:
    """Make the page, of which only the views are built. Yields after each step; adapters may come and go meanwhile."""
    names = registry.visible_names(caller)
    if query.search:
        names = yield from _searched(registry, names, query.search.casefold())
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
    data, is_cut = yield from _views(registry, caller, names[query.offset : end], query.active_only)
    return ListPage(data, has_more=is_cut or end < len(names), total=total)


def _searched(registry: Registry, names: list[str], wanted: str) -> Generator[None, None, list[str]]:
    """The names that the text is in, or in their descriptions."""
    if BETWEEN in wanted:
        return []
    texts = [name if version is None else version.searched for name, version in _with_active(registry, names)]
    found: list[str] = []
    began = time.perf_counter()
    for at in range(0, len(names), _LOOKED_AT_AT_ONCE):
        part = slice(at, at + _LOOKED_AT_AT_ONCE)
        found += [name for name, text in zip(names[part], texts[part], strict=True) if wanted in text]
        if time.perf_counter() - began > STEP_S:
            yield
            began = time.perf_counter()
    return [name for name in found if registry.has(name)]


def _views(
    registry: Registry, caller: Caller, names: list[str], active_only: bool
) -> Generator[None, None, tuple[list[AdapterView], bool]]:
    """The views of the names, and whether the page ended before the last of them."""
    data: list[AdapterView] = []
    versions = 0
    began = time.perf_counter()
    for name in names:
        if not registry.has(name):
            continue
        more = 1 if active_only else registry.version_count(name)
        if data and versions + more > MOST_VERSIONS:
            return data, True
        data.append(registry.view(name, caller, active_only))
        versions += more
        if time.perf_counter() - began > STEP_S:
            yield
            began = time.perf_counter()
    return data, False


def _with_active(registry: Registry, names: list[str]) -> list[tuple[str, Version | None]]:
    return list(zip(names, registry.active_of(names), strict=True))


def _resident(registry: Registry, names: list[str], tier: Tier) -> list[str]:
    tiers = registry.loaded()
    return [
        name
        for name, version in _with_active(registry, names)
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
