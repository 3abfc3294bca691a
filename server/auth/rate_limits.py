"""Owns what one key may use: requests at once, and tokens per minute.

Invariant: memory is bounded by the labels that have a request running or used tokens within the last minute.
"""

import math
import time
from collections import Counter
from collections.abc import Callable

from server.errors import RateLimitedError

Label = str | None
MINUTE_S = 60.0
_SWEEP_ABOVE = 256


class RateLimits:
    """Counts per label (None: the callers without a key, together). A limit of None is no limit.

    Tokens are a bucket of one minute's worth that fills steadily. They are known only after the request: one request
    may take the bucket below zero, and the next ones are rejected until it is above again.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests, self._tokens_per_minute, self._clock = max_requests, tokens_per_minute, clock
        self._running: Counter[Label] = Counter()
        self._empty_until: dict[Label, float] = {}
        """When the bucket was or will be at zero (monotonic seconds); a bucket at zero a minute ago is full."""

    def check(self, label: Label) -> None:
        """Raises RateLimitedError while the label's tokens are used up; retry_after_s is when they no longer are."""
        wait_s = self._empty_until.get(label, -math.inf) - self._clock()
        if self._tokens_per_minute is not None and wait_s >= 0:
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

    def enter(self, label: Label) -> None:
        """Count a request in; `leave` follows once its response has ended. Raises RateLimitedError."""
        self.check(label)
        if self._max_requests is not None and self._running[label] >= self._max_requests:
            message = f"rate limit reached: {self._max_requests} requests at once for this key"
            raise RateLimitedError(message, retry_after_s=1)
        self._running[label] += 1

    def leave(self, label: Label) -> None:
        """Count a request out."""
        assert self._running[label] > 0, label
        self._running[label] -= 1
        if not self._running[label]:
            del self._running[label]

    def running(self, label: Label) -> int:
        """Requests of the label that are running."""
        return self._running.get(label, 0)
