"""Owns the settings of a store that several servers share."""

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings


def default_cache() -> Path:
    """The folder of the cache unless it is set."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perft" / "adapters"


class SharingSettings(BaseSettings):
    """Only with an address as `adapter_store`."""

    adapter_cache: Path = Field(
        default_factory=default_cache,
        description="with a shared store: the folder for the adapters that this server needs; one server each",
        json_schema_extra={"default": "`$XDG_CACHE_HOME/perft/adapters`, else `~/.cache/perft/adapters`"},
    )
    adapter_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="bytes of that folder; what was not used for the longest time goes first",
        json_schema_extra={"default": "the size of the disk"},
    )
    store_lag_s: float = Field(
        2.0,
        ge=0.5,
        le=60,
        description="with a shared store: seconds that an activation, a restriction or a delete takes, after which no "
        "server lets a request in that does not know it; the same on all servers, which is checked at start",
    )
    store_grace_s: float = Field(
        60.0,
        ge=1,
        description="with a shared store: seconds without an answer of it after which /ready is 503; the same on all "
        "servers, which is checked at start",
    )
