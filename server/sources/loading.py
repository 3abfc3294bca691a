"""Owns the load of an adapter from elsewhere: allowed, fetched into a staged folder, and from there on an upload.

Invariant: nothing is opened or asked before the place is found to be allowed; a load that is asked for again before it
began to fetch is the same load, later it is the next one; the folder is gone when it has ended.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from server.auth.keys import Caller
from server.errors import ForbiddenError, InvalidRequestError
from server.sources.fetching import PARAM, Allowed, FetchLimits, fetch
from server.sources.place import Place, allowed_root, parse_place

logger = logging.getLogger(__name__)
_Key = tuple[str, Allowed, bool]
"""name, place, replaces."""


class Uploads(Protocol):
    """What takes an adapter that has been fetched (registry/service)."""

    def stage(self) -> Path: ...

    def discard(self, staged: Path) -> None: ...

    async def upload(
        self, name: str, folder: Path, activate: bool, caller: Caller, *, replaces: bool, source: str | None
    ) -> tuple[Any, bool]: ...


class AdapterSources:
    """allowed: below which places adapters may be loaded by a request; none: by no request. at_once: how many are
    fetched; others wait. count_failure: is told of one that ends before the upload, which counts itself."""

    def __init__(
        self,
        allowed: Sequence[Place],
        uploads: Uploads,
        limits: FetchLimits,
        at_once: int,
        count_failure: Callable[[Exception], object],
    ) -> None:
        self._allowed, self._uploads, self._limits = tuple(allowed), uploads, limits
        self._slots, self._count_failure = asyncio.Semaphore(at_once), count_failure
        self._waiting: dict[_Key, asyncio.Task[None]] = {}
        self._fetching: dict[_Key, asyncio.Task[None]] = {}

    def allowed(self, text: str) -> Allowed:
        """The place that a request names, whatever is there. Raises InvalidRequestError or ForbiddenError."""
        try:
            place = parse_place(text)
        except ValueError as error:
            raise InvalidRequestError(str(error), param=PARAM) from None
        if (root := allowed_root(place, self._allowed)) is None:
            raise ForbiddenError(f"found {place}, expected a place below one of --adapter-source", param=PARAM)
        return Allowed(place, root)

    async def load(self, name: str, found: Allowed, caller: Caller, *, replaces: bool) -> None:
        """Make what is there the active version of `name`. replaces: also where other content is active.

        It goes on if its caller leaves. Raises ServerError, InvalidAdapterError or StoreError.
        """
        key = (name, found, replaces)
        if (task := self._waiting.get(key)) is None:
            task = self._waiting[key] = asyncio.create_task(self._load(key, caller, self._fetching.get(key)))
            task.add_done_callback(lambda ended: self._ended(key, ended))
        await asyncio.shield(task)

    def _ended(self, key: "_Key", task: asyncio.Task[None]) -> None:
        for tasks in (self._waiting, self._fetching):
            if tasks.get(key) is task:
                del tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:  # whose callers may have left
            logger.info("the load of %s from %s failed: %s", key[0], key[1].place, error)

    async def _load(self, key: "_Key", caller: Caller, before: asyncio.Task[None] | None) -> None:
        """before: the same load, which has begun to fetch; what it reads may be old by now."""
        name, found, replaces = key
        if before is not None:
            await asyncio.wait((before,))

        def begins() -> None:
            self._fetching[key] = self._waiting.pop(key)

        async with self.fetched(found, begins) as (folder, source):
            await self._uploads.upload(name, folder, True, caller, replaces=replaces, source=source)

    @asynccontextmanager
    async def fetched(
        self, found: Allowed, begins: Callable[[], object] = lambda: None
    ) -> AsyncIterator[tuple[Path, str]]:
        """The folder that an adapter was fetched into, and the place as it is recorded. Raises ServerError."""
        async with self._slots:
            begins()
            staged: Path | None = None
            try:
                try:
                    staged = await asyncio.to_thread(self._uploads.stage)
                    source = await fetch(found, staged, self._limits)
                except Exception as error:
                    self._count_failure(error)
                    raise
                yield staged, source
            finally:
                if staged is not None:
                    await asyncio.shield(asyncio.to_thread(self._uploads.discard, staged))

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = [*self._waiting.values(), *self._fetching.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
