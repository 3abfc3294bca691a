"""Owns what all servers of a shared store must have alike: the first to start writes it down, the others are compared.

servers.json   written once, whole; goes only when an operator takes it away, with all servers stopped

Invariant: servers that passed `agree` on one file have the same values; of two that start at once with different ones,
one is refused.
"""

from pydantic import BaseModel, ConfigDict

from adapters.errors import StoreUnusableError, store_errors
from adapters.store.log.objects import Objects
from adapters.store.log.store import OF_A_SHARED_PLACE
from adapters.store.records import parse

SERVERS_FILE = "servers.json"


class Timing(BaseModel):
    """Seconds: how soon each server knows a change, and for how long one goes on that the store does not answer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    store_lag_s: float
    store_grace_s: float

    def __str__(self) -> str:
        return f"--store-lag-s {self.store_lag_s:g} and --store-grace-s {self.store_grace_s:g}"


def agree(objects: Objects, timing: Timing) -> None:
    """See to it that the store's servers have these values. Raises StoreUnusableError if others have started with
    different ones, or if that cannot be found out."""
    with store_errors(str(objects), "comparing with its other servers", OF_A_SHARED_PLACE):
        if agreed(objects) is None:
            objects.create(SERVERS_FILE, (timing.model_dump_json() + "\n").encode())
        found = agreed(objects)
    if found is None:
        raise StoreUnusableError(f"{objects}: {SERVERS_FILE} was written, and is not there; start the server again")
    if found != timing:
        raise StoreUnusableError(
            f"{objects}: found {timing} on this server, expected {found}, as its servers agreed: start with these. "
            f"To change them, stop all its servers, run `perft store timing {objects} --forget`, and start them with "
            "the new ones"
        )


def agreed(objects: Objects) -> Timing | None:
    """What the store's servers have; None if none has started yet. Raises OSError or StoreUnusableError."""
    raw = objects.get(SERVERS_FILE)
    if raw is None:
        return None
    try:
        return parse(Timing, raw)
    except ValueError as error:
        raise StoreUnusableError(
            f"{objects}: {SERVERS_FILE} is damaged, or of a newer version: {error}; use a newer version of the server, "
            f"or stop all its servers and run `perft store timing {objects} --forget`"
        ) from None
