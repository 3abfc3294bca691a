"""Owns which version a request gets by its `model`, where other servers may have changed that a moment ago."""

from typing import Protocol

from server.auth.keys import Caller
from server.errors import ModelNotFoundError
from server.following.following import Following
from server.registry.registry import Registry
from server.registry.version import Version


class Names(Protocol):
    """registry: what this server knows. following: how it keeps up with others."""

    @property
    def registry(self) -> Registry: ...

    @property
    def following(self) -> Following: ...


async def selected(names: Names, model: str, caller: Caller) -> Version | None:
    """What `model` selects now, on every server: NAME's active version, NAME@version, or None for the base.

    Raises ModelNotFoundError, or StoreUnreachableError.
    """
    if model in names.registry.base_names:
        return None
    name = model.partition("@")[0]
    await names.following.admit(name)
    try:
        return names.registry.resolve(model, caller)
    except ModelNotFoundError:
        await names.following.fresh(name)  # another server may have it since a moment ago
        return names.registry.resolve(model, caller)
