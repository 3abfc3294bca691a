"""Owns the pins: of every pinned name, the active version is kept on the device.

Invariant: a version is pinned on the device exactly while the store says so, or while a change to that is being made.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.errors import ApiError
from server.registry.version import Version
from server.residency.scheduler import ResidencyScheduler


class Pins:
    """What is pinned on the device, by name."""

    def __init__(self, plan: ResidencyScheduler, timeout_s: float) -> None:
        self._plan, self._timeout_s = plan, timeout_s
        self._held: dict[str, Version] = {}

    @asynccontextmanager
    async def moved(self, name: str, wanted: Version | None) -> AsyncIterator[None]:
        """Move the name's pin to `wanted` (None: take it off) with the change made inside; as it was if that fails.

        Raises ApiError device_full, or adapter_unavailable if `wanted` cannot be loaded, or not in time.
        """
        held = self._held.get(name)
        wanted = wanted if wanted is not None and wanted.accepted is not None else None
        if wanted is not None and wanted is not held:
            await self._pin(wanted)
        try:
            yield
        except BaseException:
            if wanted is not None and wanted is not held:
                self._plan.unpin(wanted.engine)
            raise
        if held is not None and held is not wanted:
            self._plan.unpin(held.engine)
        self._held.pop(name, None)
        if wanted is not None:
            self._held[name] = wanted

    async def _pin(self, version: Version) -> None:
        async with in_time(version, "on the device", self._timeout_s):
            await self._plan.pin(version.engine)


@asynccontextmanager
async def in_time(version: Version, where: str, timeout_s: float) -> AsyncIterator[None]:
    """Raises ApiError adapter_unavailable where a load takes longer: other changes wait meanwhile."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise ApiError(
            503,
            "adapter_unavailable",
            f"{version.id} was not {where} within {timeout_s:g} s (--load-timeout-s): try again",
            retry_after=10,
        ) from None
