"""Owns how far this server is behind the others that share its store, and what must wait until it has caught up.

A change is answered `lag_s` after it was committed, and no server lets a request in that has not looked at the store
within `lag_s`: so a request that arrives after the answer finds the change, on whichever server. Times are this
server's own monotonic ones, and a look counts from when it was sent.

Invariant: who waits for a name goes on only when the registry has every change of it up to `seen`. A name whose change
waits, for one under way here, holds up no other.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from adapters.errors import StoreError
from adapters.store import Look
from server.errors import StoreUnreachableError

logger = logging.getLogger(__name__)
POLL_S = 0.5
WAIT_S = 5.0
"""How long a request waits for the store."""


class FollowedStore(Protocol):
    """A store that others change too."""

    def catch_up(self) -> Look:
        """Read what others changed (blocks). Raises StoreError."""


class Follower:
    """take_over: brings the registry up to what the store holds of a name. in_thread: runs blocking work.

    lag_s: within how many seconds every server knows a change. grace_s: after how many without an answer of the store
    this server says that it is not ready. drain_s: how long running requests of a deleted version may go on.
    """

    def __init__(
        self,
        store: FollowedStore,
        take_over: Callable[[str], Awaitable[None]],
        in_thread: Callable[[Callable[[], Look]], Awaitable[Look]],
        clock: Callable[[], float],
        lag_s: float,
        grace_s: float,
        drain_s: float,
    ) -> None:
        self._store, self._take_over, self._in_thread, self._clock = store, take_over, in_thread, clock
        self._lag_s, self._grace_s, self._drain_s = lag_s, grace_s, drain_s
        self.seen = float("-inf")
        self._news: set[str] = set()
        """Names that others changed, and that no task has begun to take over since."""
        self._taking_over: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Catch up, and go on looking. Raises StoreError."""
        await self._look()
        await self._until_taken_over(None)
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop looking."""
        for task in (self._running, self._looking, *self._taking_over.values()):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def admit(self, name: str | None = None) -> None:
        """Return once this server may let a request for a name in. Raises StoreUnreachableError."""
        await self.catch_up_to(self._clock() - self._lag_s, name)

    async def catch_up_to(self, moment: float, name: str | None) -> None:
        """Return once everything is known of a name (None: of all) that was committed before `moment`. Raises
        StoreUnreachableError, within WAIT_S.

        Any number of callers wait for one look.
        """
        if self.seen >= moment and not self._taking_over:
            return
        try:
            async with asyncio.timeout(WAIT_S):
                while self.seen < moment:
                    await self._look()
                await self._until_taken_over(name)
        except StoreError as error:
            raise StoreUnreachableError(
                "the store does not answer, without which this server cannot know what others changed; see its log"
            ) from error
        except TimeoutError:
            silent_s = self.silent_s()
            raise StoreUnreachableError(
                f"this server has not caught up with the store for {silent_s:.0f} s: what others changed is not known"
                if self.seen < moment
                else "what another server changed waits for a change under way on this one: try again"
            ) from None

    async def fresh(self, name: str | None = None) -> None:
        """Return once everything is known that was committed before now. Raises StoreUnreachableError."""
        await self.catch_up_to(self._clock(), name)

    async def may_remove(self) -> None:
        """After a version has ended here: return once it has ended on every server, those too that are cut off."""
        await asyncio.sleep(self._lag_s + self._grace_s + self._drain_s)

    async def committed(self) -> None:
        """After a change: return once no server lets a request in that does not know it."""
        await asyncio.sleep(self._lag_s)

    def problem(self) -> str | None:
        """Why this server is not ready: it was cut off from the store for too long."""
        silent = self.silent_s()
        if silent <= self._grace_s:
            return None
        return f"the store has not answered for {silent:.0f} s, expected at most {self._grace_s:g} s"

    def silent_s(self) -> float:
        """Seconds since the look that the store answered last was sent."""
        return self._clock() - self.seen

    def names_behind(self) -> int:
        """How many names others changed that are not taken over yet."""
        return len(self._taking_over)

    async def _look(self) -> None:
        """One look, shared by all who wait for one. Raises StoreError."""
        if self._looking is None or self._looking.done():  # done, and `_looked` not called yet
            self._looking = asyncio.get_running_loop().create_task(self._look_once())
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def _looked(self, task: asyncio.Task[None]) -> None:
        if self._looking is task:
            self._looking = None
        if not task.cancelled():
            task.exception()  # told to whoever waited; the poll logs it

    async def _look_once(self) -> None:
        look = await self._in_thread(self._store.catch_up)
        self._news |= look.names
        for name in look.names - self._taking_over.keys():
            self._taking_over[name] = asyncio.get_running_loop().create_task(self._take_over_news(name))
        self.seen = max(self.seen, look.sent)

    async def _take_over_news(self, name: str) -> None:
        """Until there are none of the name."""
        try:
            while name in self._news:
                self._news.discard(name)
                try:
                    await self._take_over(name)
                except Exception:
                    logger.exception("what another server changed of %r could not be taken over; trying again", name)
                    self._news.add(name)
                    await asyncio.sleep(POLL_S)
        finally:
            del self._taking_over[name]

    async def _until_taken_over(self, name: str | None) -> None:
        while tasks := [task for each, task in self._taking_over.items() if name in (None, each)]:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        is_cut_off = False
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._look()
            except StoreError as error:
                if not is_cut_off:
                    logger.error("the store does not answer; trying again every %g s: %s", POLL_S, error)
                is_cut_off = True
            else:
                if is_cut_off:
                    logger.warning("the store answers again")
                is_cut_off = False
