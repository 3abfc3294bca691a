"""Owns what is known of the engine's life: whether it died, whether it hangs, and the end of what waits for it.

Invariant: no wait for the engine outlives it, and none goes on while it has answered nobody for `timeout_s` seconds.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from adapters.ref import AdapterRef
from server.engine.protocol import Engine, EngineCounters, EngineStatus, LoadedTier, RankInventory
from server.errors import EngineUnavailableError

TICK_S = 0.2
CONFIRM_S = 0.3
"""Seconds between the first sign of the engine's death and its announcement: an end that we were asked for looks alike
until our own signal handler has run."""
DOUBT_AFTER_S = 5.0
"""Seconds without an answer after which the engine is not called ready; a long step on a busy CPU takes seconds."""

T = TypeVar("T")


class EngineProcesses(Protocol):
    """The processes of an engine (server.engine.vllm.VllmProcesses)."""

    def is_dead(self) -> bool: ...

    def death(self) -> str:
        """What died, as a sentence."""
        ...

    def was_asked_to_end(self) -> bool:
        """Whether a dead engine ended as one does that is asked to, by a signal to all of a group for example."""
        ...


class EngineHealth:
    """Watches one engine. timeout_s: seconds without any answer after which it hangs. clock: monotonic seconds.

    death: the sentence about its death, from its announcement on.
    """

    def __init__(
        self,
        timeout_s: float,
        processes: EngineProcesses | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s, self._processes, self._clock = timeout_s, processes, clock
        self.death: str | None = None
        self._died = asyncio.Event()
        self._hangs = self._is_ending = False
        self._questions, self._is_unanswered, self._quiet_since = 0, False, clock()
        self._waits, self._patient_waits = set[asyncio.Timeout](), set[asyncio.Timeout]()
        self._task: asyncio.Task[None] | None = None

    # What is known

    def problem(self) -> str | None:
        """Why a request cannot be served now; None if it can."""
        if self.death is not None:
            return self.death
        if self._is_dead():
            return "the server is ending" if self._is_ending else "the engine died; the server ends"
        return f"the engine has not answered for {self.silent_s:.0f} s" if self._hangs else None

    def doubt(self) -> str | None:
        """Why the engine is not ready, or a wait for it ended: long before that makes requests fail."""
        if (problem := self.problem()) is not None:
            return problem
        return f"the engine has not answered for {self.silent_s:.0f} s" if self.silent_s >= DOUBT_AFTER_S else None

    def error(self) -> EngineUnavailableError | None:
        """The problem as an error."""
        problem = self.problem()
        return None if problem is None else EngineUnavailableError(problem, retry_after_s=5)

    def check(self) -> None:
        """Raises EngineUnavailableError if there is a problem."""
        error = self.error()
        if error is not None:
            raise error

    @property
    def silent_s(self) -> float:
        """Seconds for which a question to the engine has waited while no other was answered."""
        return self._clock() - self._quiet_since if self._is_unanswered else 0.0

    async def died(self) -> str:
        """Wait for the announcement of the engine's death; what died."""
        await self._died.wait()
        assert self.death is not None
        return self.death

    def was_asked_to_end(self) -> bool:
        """Whether the dead engine ended as one does that is asked to."""
        return self._processes is not None and self._processes.was_asked_to_end()

    def ending(self) -> None:
        """The server ends the engine itself from now on (from any thread): that is no death."""
        self._is_ending = True

    # What waits for the engine

    async def wait(self, work: Awaitable[T], is_patient: bool = False) -> T:
        """Await what needs the engine. is_patient: also an engine that hangs.

        Raises EngineUnavailableError as soon as there is a problem.
        """
        if not is_patient and (error := self.error()) is not None:
            if inspect.iscoroutine(work):
                work.close()
            raise error
        waits = self._patient_waits if is_patient else self._waits
        limit = asyncio.timeout(None)
        try:
            async with limit:
                waits.add(limit)
                try:
                    return await work
                finally:
                    waits.discard(limit)
        except Exception as failure:
            if limit.expired() or self._is_dead():
                raise self.error() or EngineUnavailableError("the engine did not answer", retry_after_s=5) from failure
            raise

    async def ask(self, question: Awaitable[T], is_patient: bool = False) -> T:
        """Await an answer of the engine: `wait`, and the engine is watched meanwhile."""
        if not self._is_unanswered:
            self._is_unanswered, self._quiet_since = True, self._clock()
        self._questions += 1
        is_answered = False
        try:
            answer = await self.wait(question, is_patient)
            is_answered = True
            return answer
        except (TimeoutError, EngineUnavailableError):
            raise
        except Exception:
            is_answered = True
            raise
        except asyncio.CancelledError:  # withdrawn: nothing is known
            if self._questions == 1:
                self._is_unanswered = False
            raise
        finally:
            self._questions -= 1
            if is_answered:
                self._answered()

    async def outputs(self, outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The outputs of an engine request, as long as the engine is well."""
        async with aclosing(outputs):
            while True:
                try:
                    output = await self.ask(anext(outputs))
                except StopAsyncIteration:
                    return
                yield output

    def _answered(self) -> None:
        self._quiet_since, self._is_unanswered, self._hangs = self._clock(), self._questions > 0, False

    # The watch

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        time_of_loop = asyncio.get_running_loop().time
        before = time_of_loop()
        while not self._is_dead():
            await asyncio.sleep(TICK_S)
            now = time_of_loop()
            if (late := now - before - TICK_S) > TICK_S:
                self._quiet_since += late  # this process stood still, and read no answer meanwhile
            before = now
            self._hangs = self.silent_s >= self._timeout_s
            if self._hangs:
                _end(self._waits)
        _end(self._waits | self._patient_waits)
        await asyncio.sleep(CONFIRM_S)
        if not self._is_ending:
            assert self._processes is not None
            self.death = f"the engine died: {self._processes.death()}"
            self._died.set()

    def _is_dead(self) -> bool:
        return self._processes is not None and self._processes.is_dead()


def _end(waits: set[asyncio.Timeout]) -> None:
    now = asyncio.get_running_loop().time()
    for wait in list(waits):
        if not wait.expired() and (wait.when() is None):
            wait.reschedule(now)


class WatchedEngine:
    """The engine (server.engine.protocol.Engine), of which no call outlives its death. is_patient: nor its hanging, if
    False."""

    def __init__(self, engine: Engine, health: EngineHealth, is_patient: bool = False) -> None:
        self._engine, self._health, self._is_patient = engine, health, is_patient

    async def status(self) -> EngineStatus:
        return await self._ask(self._engine.status())

    async def prepare(self, adapter: AdapterRef) -> None:
        await self._ask(self._engine.prepare(adapter))

    async def place(self, adapter: AdapterRef, evict: Sequence[AdapterRef] = ()) -> None:
        await self._ask(self._engine.place(adapter, evict))

    async def evict(self, adapter: AdapterRef) -> None:
        await self._ask(self._engine.evict(adapter))

    async def drop(self, adapter: AdapterRef) -> None:
        await self._ask(self._engine.drop(adapter))

    async def forget(self, adapter: AdapterRef) -> None:
        await self._ask(self._engine.forget(adapter))

    async def counters(self) -> EngineCounters:
        return await self._ask(self._engine.counters())

    async def inventory(self) -> list[RankInventory]:
        return await self._ask(self._engine.inventory())

    async def discard(self, key: str, tier: LoadedTier) -> None:
        await self._ask(self._engine.discard(key, tier))

    async def _ask(self, question: Awaitable[T]) -> T:
        return await self._health.ask(question, self._is_patient)
