"""Owns timers around named functions: exclusive time by part, without a profiler's cost for every other call.

Invariant: every moment of a timed call counts for exactly one part: the innermost timed function that runs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A function whose time counts as `name`. path: `package.module:Class.method` or `package.module:function`."""

    name: str
    path: str


class Timers:
    """Seconds and calls by part. For one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._running: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    @contextmanager
    def around(self, parts: Sequence[Part]) -> Iterator[None]:
        """Time these functions. Raises AttributeError or ImportError for one that is not there."""
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(self._wrapped(part))
            yield

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def _wrapped(self, part: Part) -> Iterator[None]:
        module, _, path = part.path.partition(":")
        *owners, attribute = path.split(".")
        owner: Any = import_module(module)
        for name in owners:
            owner = getattr(owner, name)
        function = getattr(owner, attribute)
        setattr(owner, attribute, self._timing(part.name, function))
        try:
            yield
        finally:
            setattr(owner, attribute, function)

    def _timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._enter(name)
            try:
                return function(*arguments, **named)
            finally:
                self._leave()

        return call

    def _enter(self, name: str) -> None:
        self._count()
        self._running.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1

    def _leave(self) -> None:
        self._count()
        self._running.pop()

    def _count(self) -> None:
        """Give the time since the last change to the part that ran."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now
