"""Owns the quotas of the store. Invariant: content that it already holds takes no more room, however often it is
uploaded."""

from pathlib import Path
from typing import Protocol

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import Room
from server.errors import QuotaExceededError


class Quotas(Protocol):
    """The settings that limit the service. Timeouts in seconds."""

    @property
    def max_adapters(self) -> int: ...
    @property
    def max_versions(self) -> int: ...
    @property
    def max_store_bytes(self) -> int | None: ...
    @property
    def drain_timeout_s(self) -> float: ...
    @property
    def load_timeout_s(self) -> float: ...


def check_quotas(quotas: Quotas, room: Room) -> None:
    """Raises QuotaExceededError if one more version is too much."""
    record, adapters, bytes_used, bytes_more = room
    problem = None
    if record is None and adapters >= quotas.max_adapters:
        problem = f"found {adapters} adapters, which is the limit (max_adapters)"
    elif record is not None and len(record.versions) >= quotas.max_versions:
        problem = f"found {len(record.versions)} versions of {record.name!r}, which is the limit (max_versions)"
    elif quotas.max_store_bytes is not None and bytes_used + bytes_more > quotas.max_store_bytes:
        problem = f"found {bytes_used} of {quotas.max_store_bytes} bytes in use (max_store_bytes)"
    if problem:
        raise QuotaExceededError(f"{problem}; delete some first")


def bytes_of(folder: Path) -> int:
    """Bytes that a staged adapter takes."""
    return sum((folder / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE))
