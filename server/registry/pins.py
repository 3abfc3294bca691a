"""Owns the pins: the active version of every pinned name is kept on the device.

Invariant: a version is pinned on the device exactly while the store says so, or while a change to that is being made.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from adapters.store import AdapterRecord
from server.errors import AdapterUnavailableError, ServerError
from server.registry.version import Version
from server.residency.scheduler import ResidencyScheduler

logger = logging.getLogger(__name__)


class Pins:
    """What is pinned on the device, by name. known: a version by its name and number. timeout_s: seconds that pinning
    may take."""

    def __init__(self, scheduler: ResidencyScheduler, known: Callable[[str, int], Version], timeout_s: float) -> None:
        self._scheduler, self._known, self._timeout_s = scheduler, known, timeout_s
        self._pinned: dict[str, Version] = {}

    def changed(self, record: AdapterRecord, changes: dict[str, Any]) -> AbstractAsyncContextManager[None]:
        """Around a change of a record: moves the name's pin if the change concerns it, and leaves it alone if not."""
        if not changes.keys() & {"active", "pinned"}:
            return nullcontext()
        return self.moved(record.name, self._wanted(record.changed(**changes)))

    async def restore(self, record: AdapterRecord | None) -> None:
        """Bring what is pinned to the device, as far as that is possible."""
        if record is None:
            return
        try:
            async with self.moved(record.name, self._wanted(record)):
                pass
        except ServerError as error:
            logger.warning("%s is pinned, but not on the device: %s", record.name, error.message)

    def _wanted(self, record: AdapterRecord) -> Version | None:
        return self._known(record.name, record.active) if record.pinned and record.active is not None else None

    @asynccontextmanager
    async def moved(self, name: str, wanted: Version | None) -> AsyncIterator[None]:
        """Move the name's pin to `wanted` (None: remove it) around a change; if the change fails, it stays as it was.

        Raises DeviceFullError, or AdapterUnavailableError if `wanted` cannot be loaded, or not in time.
        """
        pinned = self._pinned.get(name)
        wanted = wanted if wanted is not None and wanted.accepted is not None else None
        if wanted is not None and wanted is not pinned:
            async with load_timeout(wanted, "on the device", self._timeout_s):
                await self._scheduler.pin(wanted.ref)
        try:
            yield
        except BaseException:
            if wanted is not None and wanted is not pinned:
                self._scheduler.unpin(wanted.ref)
            raise
        if pinned is not None and pinned is not wanted:
            self._scheduler.unpin(pinned.ref)
        self._pinned.pop(name, None)
        if wanted is not None:
            self._pinned[name] = wanted


@asynccontextmanager
async def load_timeout(version: Version, where: str, timeout_s: float) -> AsyncIterator[None]:
    """Raises AdapterUnavailableError if a load takes longer than `timeout_s` seconds: other changes wait meanwhile."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        message = f"{version.id} was not {where} within {timeout_s:g} s (--load-timeout-s): try again"
        raise AdapterUnavailableError(message, retry_after_s=10) from None
