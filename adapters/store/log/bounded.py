"""Owns calls of a file system that may hang: while a server of NFS is gone, every thread that asks it is kept.

Invariant: `run` ends within `patience_s` of the call's last sign of life, and at most MOST_HANGING threads are kept.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
Alive = Callable[[], None]
"""What a long call calls as a sign of life."""
MOST_HANGING = 16


class BoundedCalls:
    """Each call has a thread of its own. One that was given up may be carried out later all the same.

    patience_s: monotonic seconds without a sign of life.
    place: what is asked, in the threads' names.
    """

    def __init__(self, patience_s: float, place: str = "") -> None:
        self._patience_s = patience_s
        self._thread_name = f"perft-store-call {place}".rstrip()
        self._hanging = 0
        self._counting = threading.Lock()

    def run(self, work: Callable[[Alive], T]) -> T:
        """What `work` returns or raises. Raises TimeoutError if it hangs, or too many calls before it still do."""
        if self._hanging >= MOST_HANGING:
            raise TimeoutError(f"{self._hanging} earlier calls hang; check the mount and its server")
        answer: Future[T] = Future()
        seen = [time.monotonic()]

        def alive() -> None:
            seen[0] = time.monotonic()

        def call() -> None:
            try:
                answer.set_result(work(alive))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=call, name=self._thread_name, daemon=True).start()
        while (left_s := seen[0] + self._patience_s - time.monotonic()) > 0:
            if wait([answer], left_s).done:
                return answer.result()
        self._count(1)
        answer.add_done_callback(lambda _: self._count(-1))
        raise TimeoutError(f"no answer in {self._patience_s:g} s; check the mount and its server")

    def _count(self, more: int) -> None:
        with self._counting:
            self._hanging += more
