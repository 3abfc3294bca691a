"""Owns slots for which keys take turns: each key holds at most one, and each free one goes to the next key that waits.

Invariant: a key that waits gets a slot before any other key gets its second one.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import RateLimitedError

Label = str | None


@dataclass
class Hold:
    """A slot that is held. rest_s: seconds for which it stays taken after its holder is done."""

    rest_s: float = 0.0


class KeySlots:
    """slots: how many at once. max_waiting: of one key."""

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._free, self._max_waiting = slots, max_waiting
        self._holders: set[Label] = set()
        self._waiting: OrderedDict[Label, deque[asyncio.Future[None]]] = OrderedDict()
        """The waiters of each key; the key whose turn is next comes first."""

    @asynccontextmanager
    async def hold(self, label: Label) -> AsyncIterator[Hold]:
        """Wait for a slot and keep it. Raises RateLimitedError if too many of this key wait."""
        await self._acquire(label)
        hold = Hold()
        try:
            yield hold
        finally:
            if hold.rest_s > 0:
                asyncio.get_running_loop().call_later(hold.rest_s, self._release, label)
            else:
                self._release(label)

    async def _acquire(self, label: Label) -> None:
        queue = self._waiting.setdefault(label, deque())
        if len(queue) >= self._max_waiting:
            message = f"rate limit reached: {self._max_waiting} structured-output specs of this key wait to be compiled"
            raise RateLimitedError(message, retry_after_s=1)
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(label)
            elif turn in queue:
                queue.remove(turn)
                if self._waiting.get(label) is queue:
                    self._forget(label)
            raise

    def _release(self, label: Label) -> None:
        self._holders.discard(label)
        self._free += 1
        if label in self._waiting:
            self._waiting.move_to_end(label)
        self._hand_out()

    def _hand_out(self) -> None:
        for label in list(self._waiting):
            if self._free == 0:
                return
            if label in self._holders:
                continue
            queue = self._waiting[label]
            while queue and queue[0].cancelled():
                queue.popleft()
            turn = queue.popleft() if queue else None
            self._waiting.move_to_end(label)
            self._forget(label)
            if turn is None:
                continue
            self._holders.add(label)
            self._free -= 1
            turn.set_result(None)

    def _forget(self, label: Label) -> None:
        if not self._waiting.get(label, True):
            del self._waiting[label]
