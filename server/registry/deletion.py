"""Owns the ends of versions: what runs may finish, what takes too long is ended, then device, host and disk are freed.

Invariant: nothing of a version is freed while a request uses it, and what the store holds as draining is gone in the
end, whatever fails on the way: here, or after the next start.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from adapters import StoreError
from server.registry.version import Version, adapter_deleted
from server.residency.scheduler import ResidencyScheduler

LAST_BYTES_S = 2.0
"""How long ended requests of a deleted version have for the last bytes of their answers."""
POLL_S = 0.02
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 60.0

logger = logging.getLogger(__name__)


class Deletions:
    """Versions on their way out. abort: ends an engine request by its id. remove: takes a version out of the store."""

    def __init__(
        self,
        plan: ResidencyScheduler,
        abort: Callable[[str], Awaitable[None]],
        remove: Callable[[Version], Awaitable[None]],
        drain_timeout_s: float,
    ) -> None:
        self._plan, self._abort, self._remove, self._drain_timeout_s = plan, abort, remove, drain_timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, version: Version) -> None:
        """Begin with a version that is draining in the store."""
        task = asyncio.get_running_loop().create_task(self._end(version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop where it is; the next start goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end(self, version: Version) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                await version.idle.wait()
        version.is_deleted = True
        if version.accepted is not None:
            try:
                await self._free(version)
            except Exception:
                logger.exception("%s is deleted, but the engine could not be told so", version.id)
        await self._remove_from_disk(version)

    async def _free(self, version: Version) -> None:
        """End what still runs, then take the version off the device and the host."""
        self._plan.fail_waiters(version.engine, adapter_deleted(version))
        for request_id in list(version.running):
            await self._abort(request_id)
        with suppress(TimeoutError):  # who does not read its last bytes keeps nobody waiting
            async with asyncio.timeout(LAST_BYTES_S):
                await version.idle.wait()
                while version.running:
                    await asyncio.sleep(POLL_S)
        await self._plan.remove(version.engine)

    async def _remove_from_disk(self, version: Version) -> None:
        pause = FIRST_RETRY_S
        while True:
            try:
                return await self._remove(version)
            except StoreError as error:
                logger.error("%s stays draining, another try in %g s: %s", version.id, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S)
