"""An event loop whose time passes only while everybody sleeps: hours of timers in a moment, the same at every run."""

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 1000 s. after_each: called after every round of callbacks; what it raises ends the run.

    problems: what asyncio would only have logged. A run in which nothing can ever happen again raises.
    """

    def __init__(self, after_each: Callable[[], None] = lambda: None) -> None:
        self.now, self.after_each = 1000.0, after_each
        self.problems: list[str] = []
        super().__init__(_Jump(self))
        self.set_exception_handler(lambda _, context: self.problems.append(f"{context}"))

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        self.after_each()


class _Jump(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for something that will never come"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


def run_virtually(main: Coroutine[Any, Any, T], after_each: Callable[[], None] = lambda: None) -> T:
    """`asyncio.run` in virtual time; asserts that no task or future ended with something nobody saw."""
    loop = VirtualLoop(after_each)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(main)
        gc.collect(1)
    assert not loop.problems, loop.problems
    return result
