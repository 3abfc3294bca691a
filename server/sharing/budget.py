"""Owns the memory that large bodies take together.

Invariant: what was taken is given back once, also by who leaves while it waits.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class _Waiting:
    """A body that waits for memory. size: bytes."""

    size: int
    caller: str | None
    granted: asyncio.Future[None]


class BodyBudget:
    """Bytes of memory for large bodies; who finds too few left waits its turn. total: bytes.

    A body may stay for long (it arrives slowly, or its request waits for an adapter), so that of one caller takes half
    of them at most, and another's need not wait for it.
    """

    def __init__(self, total: int) -> None:
        self._total = self.free = total
        self._held: Counter[str] = Counter()
        self._waiting: dict[_Waiting, None] = {}

    async def take(self, size: int, caller: str | None = None) -> Callable[[], None]:
        """Take `size` bytes, as soon as they are free. Returns what gives them back, once. caller: whose body it is;
        None: of all callers together."""
        waiting = _Waiting(min(size, self._total), caller, asyncio.get_running_loop().create_future())
        self._waiting[waiting] = None
        self._hand_out()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                del self._waiting[waiting]
                self._hand_out()
            else:
                self._give_back(waiting)
            raise
        taken = [waiting]
        return lambda: self._give_back(taken.pop()) if taken else None

    def _give_back(self, body: _Waiting) -> None:
        self.free += body.size
        if body.caller is not None:
            self._held[body.caller] -= body.size
            self._held = +self._held  # without those that hold nothing
        self._hand_out()

    def _hand_out(self) -> None:
        for body in list(self._waiting):
            if self._has_its_share(body):
                continue
            if body.size > self.free:
                return
            del self._waiting[body]
            self.free -= body.size
            if body.caller is not None:
                self._held[body.caller] += body.size
            if not body.granted.done():
                body.granted.set_result(None)

    def _has_its_share(self, body: _Waiting) -> bool:
        held = 0 if body.caller is None else self._held[body.caller]
        return held > 0 and held + body.size > self._total // 2
