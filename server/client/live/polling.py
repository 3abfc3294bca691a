"""Owns asking a server again and again beside a view: what came last, and what went wrong since.

Invariant: a poller asks at most once in its interval unless `ask_now` is called, and a server that goes away and comes
back is only a problem that ends.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from server.client.connection import ClientError

Value = TypeVar("Value")

REFUSED_S = 10.0
"""The pause after a refusal that will not pass by itself: the view goes on without it."""
END_S = 1.0


@dataclass(frozen=True)
class Polled(Generic[Value]):
    """The last answer, and the problem since, if there is one. since, back: unix seconds of its begin and its end."""

    value: Value | None = None
    problem: ClientError | None = None
    since: float | None = None
    back: float | None = None


class Poller(Generic[Value]):
    """Asks with `ask` on a thread of its own, every `interval_s` seconds."""

    def __init__(self, ask: Callable[[], Value], interval_s: float) -> None:
        self._ask, self._interval_s = ask, interval_s
        self._is_ended, self._wake = False, threading.Event()
        self.latest = Polled[Value]()
        self.answers = 0
        """How many answers and problems there were."""
        self.defect: Exception | None = None
        """What ended it, if it was no problem of the server's: to be raised by whoever shows the view."""

    def ask_now(self) -> None:
        """Do not wait for the interval's end: what is asked is another thing now."""
        self._wake.set()

    def poll(self) -> None:
        """Ask once. Raises nothing that the server can cause."""
        last = self.latest
        try:
            value = self._ask()
        except ClientError as error:
            self.latest = replace(last, problem=error, since=last.since or time.time())
        else:
            self.latest = Polled(value, None, None, time.time() if last.problem is not None else last.back)
        self.answers += 1

    def run(self) -> None:
        while not self._is_ended:
            try:
                self.poll()
            except Exception as error:
                self.defect = error
                return
            problem = self.latest.problem
            is_refused = problem is not None and not problem.may_pass
            self._wake.wait(max(self._interval_s, REFUSED_S) if is_refused else self._interval_s)
            self._wake.clear()

    def end(self) -> None:
        self._is_ended = True
        self._wake.set()


@contextmanager
def polling(pollers: Sequence[Poller[Any]]) -> Iterator[None]:
    """Run them. A thread that still waits for its server at the end is left to the end of the process."""
    threads = [threading.Thread(target=poller.run, daemon=True) for poller in pollers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for poller in pollers:
            poller.end()
        deadline = time.monotonic() + END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
