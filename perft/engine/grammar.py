"""Owns what a structured-output grammar may cost in the engine: its compile's priority, and its time for each token.

vLLM fills a mask of allowed tokens before every token of such a request, on the thread that runs the engine's steps,
and has no limit for it. Invariant: a step waits for a grammar only as long as that grammar's budget lasts, and a
grammar out of budget ends the requests that use it, no others.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

ONCE_S = 0.1
"""CPU seconds for one mask, or for accepting one step's tokens."""
HURRIED_S = 0.01
"""The same, once grammars have run into ONCE_S often."""
OVERRUNS_S = 0.3
"""CPU seconds that overruns may take together before the rest are hurried; a tenth of real time is forgiven."""
FIRST_S, EACH_S = 0.4, 0.01
"""CPU seconds of one request's grammar: at once, and more for each token. A try gets half (grammar_probe)."""
LOOK_EVERY_S = 0.005
COMPILE_NICE, OVERRUN_NICE = 10, 19
"""Priorities of threads whose work no step waits for."""

logger = logging.getLogger(__name__)


@dataclass
class TokenBudget:
    """CPU seconds that a grammar may take: `first_s` at once, and `each_s` for each token."""

    first_s: float = FIRST_S
    each_s: float = EACH_S
    spent_s: float = 0.0
    tokens: int = 0

    @property
    def is_exceeded(self) -> bool:
        return self.spent_s > self.first_s + self.each_s * self.tokens


class OverrunError(Exception):
    """Work took more CPU time than it may; its thread is left to finish it alone."""


class TimedThread:
    """Does one piece of native work after the other, and can be left alone with one that takes too long."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grammar", daemon=True)
        self._thread.start()
        self._clock, self._cpu_s = time.pthread_getcpuclockid(self._thread.ident or 0), 0.0

    def cpu_s(self) -> float:
        """CPU seconds of the thread; of one that was left alone and has ended, as of the last look."""
        with contextlib.suppress(OSError):
            self._cpu_s = time.clock_gettime(self._clock)
        return self._cpu_s

    def call(self, work: Callable[[], Any], limit_s: float) -> Any:
        """What `work` returns or raises. Raises OverrunError; then this object must not be used again."""
        began = self.cpu_s()
        self._work.put(work)
        while True:
            try:
                result, error = self._done.get(timeout=LOOK_EVERY_S)
            except Empty:
                if self.cpu_s() - began > limit_s:
                    self._leave()
                    raise OverrunError from None
                continue
            if error is not None:
                raise error
            return result

    def _leave(self) -> None:
        self._work.put(None)
        _lower_priority(self._thread, OVERRUN_NICE)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._done.put((work(), None))
            except Exception as error:
                self._done.put((None, error))


class GrammarThread:
    """The thread on which an engine's grammars work, while its step waits. Used by one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._thread: TimedThread | None = None
        self._overruns_s, self._counted_at = 0.0, clock()

    def call(self, work: Callable[[], Any], budget: TokenBudget) -> Any:
        """Do `work` and charge the budget. Raises OverrunError."""
        with self._lock:
            now = self._clock()
            self._overruns_s = max(0.0, self._overruns_s - 0.1 * (now - self._counted_at))
            self._counted_at = now
            thread = self._thread = self._thread or TimedThread()
            began = thread.cpu_s()
            try:
                return thread.call(work, ONCE_S if self._overruns_s < OVERRUNS_S else HURRIED_S)
            except OverrunError:
                self._thread = None
                self._overruns_s += thread.cpu_s() - began
                raise
            finally:
                budget.spent_s += thread.cpu_s() - began


@dataclass
class SpecState:
    """What the requests of one spec share: whether a thread was left alone with it, which ends them all."""

    has_overrun: bool = False


@dataclass
class BoundedGrammar(XgrammarGrammar):
    """vLLM's grammar of one request; out of budget it accepts no further token, and vLLM ends the request."""

    thread: GrammarThread = field(default_factory=GrammarThread)
    state: SpecState = field(default_factory=SpecState)
    budget: TokenBudget = field(default_factory=TokenBudget)

    @property
    def is_ended(self) -> bool:
        return self.state.has_overrun or self.budget.is_exceeded

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        accept = super().accept_tokens
        if not self._within_budget(lambda: accept(request_id, tokens)):
            logger.warning("request %s is ended: its grammar takes too long or cannot go on", request_id)
            return False
        self.budget.tokens += len(tokens)
        return True

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """Where there is no mask every token is allowed; `accept_tokens` then ends the request."""
        row = torch.full((1, bitmask.shape[1]), -1, dtype=bitmask.dtype)  # its own: left alone, it is still written to
        fill = super().fill_bitmask
        self._within_budget(lambda: fill(row, 0))
        if self.state.has_overrun:
            bitmask[idx].fill_(-1)
        else:
            bitmask[idx].copy_(row[0])

    def _within_budget(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; None if the grammar is out of budget."""
        if self.is_ended:
            return None
        try:
            return self.thread.call(work, self.budget)
        except OverrunError:
            self.state.has_overrun = True
            return None


class BoundedXgrammarBackend(XgrammarBackend):
    """vLLM's back end, whose grammars have a budget and whose compiles give way to the engine's steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.thread = GrammarThread()
        self._states: WeakValueDictionary[tuple[Any, str], SpecState] = WeakValueDictionary()

    def compile_grammar(self, request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None) -> Any:
        if threading.current_thread() is not threading.main_thread():  # xgrammar's own threads inherit it
            _lower_priority(threading.current_thread(), COMPILE_NICE)
        grammar = super().compile_grammar(request_type, grammar_spec, stop_token_ids)
        state = self._states.setdefault((request_type, grammar_spec), SpecState())
        return BoundedGrammar(grammar.vocab_size, grammar.matcher, grammar.ctx, thread=self.thread, state=state)


def install_bounded_grammars() -> None:
    """Have the engine's StructuredOutputManager build our back end."""
    from vllm.v1 import structured_output

    structured_output.XgrammarBackend = BoundedXgrammarBackend


def _lower_priority(thread: threading.Thread, nice: int) -> None:
    """Linux has a priority for each thread; where that fails, it stays as it is."""
    if thread.native_id is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread.native_id, nice)
