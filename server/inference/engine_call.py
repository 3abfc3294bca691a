"""Owns one call of the engine: its sequences, each an engine request of its own, and what comes of them.

A call for n choices is n sequences, so that they wait, run and end one by one beside those of other keys. Each is read
by a task of its own; a caller that leaves ends that task only by way of the engine, whose last output says how much
was generated. Invariants: a sequence runs only while it holds its leases; every call ends in `ended`, once, when
nothing of it runs in the engine any more, or after `SETTLE_S`.
"""

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from server.inference.timing import AT_ONCE, RequestTiming

logger = logging.getLogger(__name__)

UNREAD = 16
"""Outputs kept for a caller that reads slowly, or one of each sequence; after that vLLM joins them."""
SETTLE_S = 10.0
"""Seconds for the last outputs of a call whose caller left."""
ABORT_AGAIN_S = 0.25
"""An abort misses a request that the engine is just about to take."""


class Surroundings(Protocol):
    """What a call needs (server.inference.engine_hook)."""

    def running(self, request_id: str) -> AbstractAsyncContextManager[None]:
        """Hold what an engine request needs to run."""
        ...

    def start(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """The outputs of a new engine request."""
        ...

    async def abort(self, request_ids: list[str]) -> None: ...

    def generated_so_far(self, request_id: str) -> int:
        """Tokens of a running engine request, none of which an output has reported yet, as far as they are known."""
        ...

    def check(self, output: Any, params: Any) -> None:
        """Raises what ends the call before its time."""
        ...

    def ended(self, call: "EngineCall") -> None: ...


@dataclass(eq=False)
class _Part:
    """One sequence. index: which choice it is."""

    index: int
    request_id: str
    params: Any
    is_submitted: bool = False
    is_finished: bool = False
    """Its last output has come."""


class EngineCall:
    """One call. began: monotonic seconds. error: what ended it. finish_reason: of its last output.

    `end` follows, whatever becomes of it.
    """

    def __init__(self, around: Surroundings, prompt: Any, params: Any, request_id: str, began: float) -> None:
        self._around, self._prompt = around, prompt
        self.timing = RequestTiming(params, began)
        self._is_at_once = params.output_kind.name == AT_ONCE
        self._parts = [_Part(*part) for part in _split(params, request_id)]
        # Emptied once, it has room for whatever each task is about to put: none goes on waiting.
        self._outputs: asyncio.Queue[Any] = asyncio.Queue(max(UNREAD, len(self._parts)))
        self._finals: dict[int, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._unread = len(self._parts)
        self._ending: asyncio.Task[None] | None = None
        self._has_left = self._has_ended = False
        self.error: Exception | None = None
        self.finish_reason: str | None = None

    @property
    def sequences(self) -> int:
        return len(self._parts)

    def tokens(self) -> int:
        """Tokens that it used so far, prompt and generated."""
        if self._has_ended:
            return self.timing.prompt_tokens + self.timing.generation_tokens
        known = self.timing.tokens_so_far
        if not self._is_at_once:
            return known
        running = (part for part in self._parts if part.is_submitted and not part.is_finished)
        return known + sum(self._around.generated_so_far(part.request_id) for part in running)

    async def outputs(self) -> AsyncGenerator[Any, None]:
        """What the engine puts out. Raises what ended the call."""
        self._tasks = [asyncio.create_task(self._read(part)) for part in self._parts]
        while (output := await self._outputs.get()) is not None:
            yield output
        if self.error is not None:
            raise self.error

    async def _read(self, part: _Part) -> None:
        """Read one sequence until it holds nothing; the last to end closes the queue, an error does so at once."""
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self._around.running(part.request_id))
                part.is_submitted = True
                self.timing.submitted(self._prompt)
                outputs = self._around.start(self._prompt, part.params, part.request_id)
                async for output in await stack.enter_async_context(aclosing(outputs)):
                    await self._take(part, output)
        except Exception as error:
            self.error = self.error or error
        part.is_finished = True
        self._unread -= 1
        if self.error is not None or not self._unread:
            await self._put(None)

    async def _take(self, part: _Part, output: Any) -> None:
        for choice in output.outputs if len(self._parts) > 1 else ():
            choice.index = part.index
        part.is_finished = output.finished
        output.finished = all(other.is_finished for other in self._parts)
        self.finish_reason = self.timing.add_output(output) or self.finish_reason
        if self._has_left:
            return
        self._around.check(output, part.params)
        if self._is_at_once and len(self._parts) > 1:
            self._finals |= {choice.index: choice for choice in output.outputs}
            if not output.finished:
                return
            output.outputs = [self._finals[index] for index in sorted(self._finals)]
        await self._put(output)

    async def _put(self, output: Any) -> None:
        if not self._has_left:
            await self._outputs.put(output)

    async def end(self, error: Exception | None = None) -> None:
        """Return once the call is over, one way or another; it goes on to its end if its caller does not wait."""
        self.error = self.error or error
        if all(task.done() for task in self._tasks):
            return self._finish()
        if self._ending is None:
            self._ending = asyncio.create_task(self._settle())
        await asyncio.shield(self._ending)

    async def _settle(self) -> None:
        """End what still runs by way of the engine, and read its last outputs."""
        self._has_left = True
        while not self._outputs.empty():
            self._outputs.get_nowait()
        for part, task in zip(self._parts, self._tasks, strict=True):
            if not part.is_submitted:
                task.cancel()
        try:
            async with asyncio.timeout(SETTLE_S):
                await self._abort()
        except Exception as error:
            logger.warning("the last outputs of a request that was left could not be read: %r", error)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.timing.abandoned()
        self._finish()

    async def _abort(self) -> None:
        while running := [part for part, task in self._running() if not part.is_finished]:
            await self._around.abort([part.request_id for part in running])
            await asyncio.wait([task for _, task in self._running()], timeout=ABORT_AGAIN_S)
        if tasks := [task for _, task in self._running()]:
            await asyncio.wait(tasks)

    def _running(self) -> list[tuple[_Part, asyncio.Task[None]]]:
        return [pair for pair in zip(self._parts, self._tasks, strict=True) if not pair[1].done()]

    def _finish(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._around.ended(self)


def _split(params: Any, request_id: str) -> list[tuple[int, str, Any]]:
    """The parts of a request, as vLLM's own ParentRequest divides it: a seed is counted up by the choice's number."""
    number: int = getattr(params, "n", 1)
    if number == 1:
        return [(0, request_id, params)]
    parts = []
    for index in range(number):
        own = copy.copy(params)
        own.n = 1
        if params.seed is not None:
            own.seed = params.seed + index
        parts.append((index, f"{request_id}-{index}", own))
    return parts
