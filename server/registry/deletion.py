"""Owns how a version ends: running requests may finish, late ones are ended, then device, host and disk are freed.

Invariant: nothing of a version is freed while a request uses it, and what the store holds as draining is removed in the
end, whatever fails on the way: now, or after the next start.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from adapters.errors import StoreError
from server.registry.version import Version, adapter_deleted
from server.residency.scheduler import ResidencyScheduler

LAST_BYTES_S = 2.0
"""Seconds that ended requests of a deleted version have for the last bytes of their responses."""
POLL_S = 0.02
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 60.0

logger = logging.getLogger(__name__)


class Deletions:
    """Versions that are being deleted. abort: ends an engine request by its id. remove: removes a version from the
    store.

    drain_timeout_s: seconds that running requests have to finish.
    """

    def __init__(
        self,
        scheduler: ResidencyScheduler,
        abort: Callable[[str], Awaitable[None]],
        remove: Callable[[Version], Awaitable[None]],
        drain_timeout_s: float,
    ) -> None:
        self._scheduler, self._abort, self._remove = scheduler, abort, remove
        self._drain_timeout_s = drain_timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, version: Version) -> None:
        """Delete a version that the store holds as draining."""
        task = asyncio.get_running_loop().create_task(self._delete(version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop; the next start of the server resumes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _delete(self, version: Version) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                await version.idle.wait()
        version.is_deleted = True
        if version.accepted is not None:
            try:
                await self._free(version)
            except Exception:
                logger.exception("%s is deleted, but the engine could not free it", version.id)
        await self._remove_from_store(version)

    async def _free(self, version: Version) -> None:
        """End what still runs, then free the version on the device and the host."""
        self._scheduler.fail_waiters(version.ref, adapter_deleted(version))
        for request_id in list(version.running):
            try:
                await self._abort(request_id)
            except Exception:
                logger.exception("a request of %s could not be aborted", version.id)
        with suppress(TimeoutError):  # a client that does not read its last bytes must not block this
            async with asyncio.timeout(LAST_BYTES_S):
                await version.idle.wait()
                while version.running:
                    await asyncio.sleep(POLL_S)
        await self._scheduler.remove(version.ref)

    async def _remove_from_store(self, version: Version) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                return await self._remove(version)
            except StoreError as error:
                logger.error("%s stays draining; retrying in %g s: %s", version.id, pause_s, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)
