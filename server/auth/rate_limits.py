"""Owns what one key may use: sequences at once (requests, their prompts and their choices), and tokens per minute.

Invariants: memory is bounded by the labels that have a request running or used tokens within the last minute; what is
counted in is counted out.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import RateLimitedError

Label = str | None
MINUTE_S = 60.0
_SWEEP_ABOVE = 256


class RateLimits:
    """Counts per label (None: the callers without a key, together). A limit of None is no limit.

    Tokens are a bucket of one minute's worth that fills steadily. A running request is charged for what it used so far
    whenever another one is checked. One request may take the bucket below zero, and the next ones are rejected until it
    is above again.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests, self._tokens_per_minute, self._clock = max_requests, tokens_per_minute, clock
        self._running: Counter[Label] = Counter()
        self._meters: dict[Label, dict[_Meter, None]] = {}
        self._empty_until: dict[Label, float] = {}
        """When the bucket was or will be at zero (monotonic seconds); a bucket at zero a minute ago is full."""

    def check(self, label: Label) -> None:
        """Raises RateLimitedError while the label's tokens are used up; retry_after_s is when they no longer are."""
        if self._tokens_per_minute is None:
            return
        for meter in self._meters.get(label, ()):
            self.charge(label, meter.grown())
        wait_s = self._empty_until.get(label, -math.inf) - self._clock()
        if wait_s >= 0:
            message = f"rate limit reached: {self._tokens_per_minute} tokens per minute for this key"
            raise RateLimitedError(message, retry_after_s=math.floor(wait_s) + 1)

    def charge(self, label: Label, tokens: int) -> None:
        """Count tokens that were used (prompt and generated)."""
        assert tokens >= 0, tokens
        if self._tokens_per_minute is None or tokens == 0:
            return
        now = self._clock()
        start = max(self._empty_until.get(label, -math.inf), now - MINUTE_S)
        self._empty_until[label] = start + tokens * MINUTE_S / self._tokens_per_minute
        if len(self._empty_until) > _SWEEP_ABOVE:
            self._empty_until = {k: at for k, at in self._empty_until.items() if at > now - MINUTE_S}

    @contextmanager
    def metered(self, label: Label, used: Callable[[], int]) -> Iterator[None]:
        """Charge what is used meanwhile. used: tokens so far."""
        meter = _Meter(used)
        self._meters.setdefault(label, {})[meter] = None
        try:
            yield
        finally:
            self.charge(label, meter.grown())
            del self._meters[label][meter]
            if not self._meters[label]:
                del self._meters[label]

    def enter(self, label: Label) -> None:
        """Count a request in, as one sequence; `leave` follows once its response has ended. Raises RateLimitedError."""
        self.check(label)
        self.claim(label, 1)

    def check_room(self, label: Label, sequences: int) -> None:
        """Raises RateLimitedError unless a request that was counted in may have so many sequences."""
        if self._max_requests is not None and self._running[label] - 1 + sequences > self._max_requests:
            raise self._too_many(label, sequences, self._running[label] - 1)

    def claim(self, label: Label, sequences: int) -> None:
        """Count further sequences in; `leave` follows. Raises RateLimitedError."""
        if self._max_requests is not None and self._running[label] + sequences > self._max_requests:
            raise self._too_many(label, sequences, self._running[label])
        self._running[label] += sequences

    def leave(self, label: Label, sequences: int = 1) -> None:
        """Count sequences out."""
        assert self._running[label] >= sequences, label
        self._running[label] -= sequences
        if not self._running[label]:
            del self._running[label]

    def _too_many(self, label: Label, more: int, running: int) -> RateLimitedError:
        return RateLimitedError(
            f"rate limit reached: {self._max_requests} requests at once for this key, where each prompt and each of "
            f"its n choices counts; found {running} running and {more} more asked for; ask for fewer at once, or "
            "retry once others have ended",
            retry_after_s=1,
        )

    def running(self, label: Label) -> int:
        """Sequences of the label that are running."""
        return self._running.get(label, 0)


class _Meter:
    """What one running request used. used: tokens so far."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used, self._charged = used, 0

    def grown(self) -> int:
        """Tokens since the last time (an estimate that turns out too high is given back later)."""
        grown = max(0, self._used() - self._charged)
        self._charged += grown
        return grown
