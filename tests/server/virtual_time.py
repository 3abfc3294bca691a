"""An event loop whose time passes only while every task sleeps: hours of timers in a moment, the same in every run.

Work in threads (a store, a validation) takes no time at all: the loop's clock stands still until it is done, however
busy the machine is.
"""

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_WORK_S = 300.0
"""Real seconds after which a thread is taken to wait for the loop, which waits for it."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 1000 s. after_each: called after every round of callbacks; what it raises ends the run.

    problems: what asyncio would only have logged. A run in which nothing can ever happen again raises.
    """

    def __init__(self, after_each: Callable[[], None] = lambda: None) -> None:
        self.now, self.after_each = 1000.0, after_each
        self.problems: list[str] = []
        self.working = 0
        """Calls in threads that have not ended."""
        self._threads = ThreadPoolExecutor(4, "virtual-loop")
        super().__init__(_Jump(self))
        self.set_exception_handler(lambda _, context: self.problems.append(f"{context}"))

    def time(self) -> float:
        return self.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        work = (executor or self._threads).submit(func, *args)
        self.working += 1
        future = asyncio.wrap_future(work, loop=self)
        work.add_done_callback(lambda _: self._tell_end())  # behind what wakes the future
        return future

    def _tell_end(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.working -= 1

    def close(self) -> None:
        self._threads.shutdown()
        super().close()

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        self.after_each()


class _Jump(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if self._loop.working and timeout != 0:
            woken = super().select(LONGEST_WORK_S)
            assert woken, f"a thread has worked for {LONGEST_WORK_S} s"
            return woken
        assert timeout is not None, "every task waits for something that will never come"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


def run_virtually(main: Coroutine[Any, Any, T], after_each: Callable[[], None] = lambda: None) -> T:
    """`asyncio.run` in virtual time; asserts that no task or future ended with an exception that nothing retrieved."""
    loop = VirtualLoop(after_each)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(main)
        gc.collect(1)
    assert not loop.problems, loop.problems
    return result
