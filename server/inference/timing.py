"""Owns the measurements of one engine request: tokens, time to first token, time between tokens.

Where the handler streams, they are taken as the tokens pass; where it asks for the whole answer at once, from vLLM's
own timestamps.
"""

import time
from typing import Any, Protocol

STREAMED, AT_ONCE = "DELTA", "FINAL_ONLY"
"""Names of vLLM's RequestOutputKind."""


class RequestMetrics(Protocol):
    """What counts requests (the metrics). adapter: a bare NAME, None for the base. All durations in seconds."""

    def request_finished(
        self, adapter: str | None, finish_reason: str, prompt_tokens: int, generation_tokens: int, seconds: float
    ) -> None: ...

    def first_token(self, adapter: str | None, seconds: float) -> None: ...

    def inter_token(self, adapter: str | None, seconds: float, tokens: int = 1) -> None: ...


class RequestTiming:
    """One request. began: its arrival (monotonic seconds)."""

    def __init__(self, sampling_params: Any, began: float) -> None:
        self._kind: str = sampling_params.output_kind.name
        self.began = began
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.has_output = self.finished = False
        self._arrived_at = time.monotonic()
        """When vLLM's own times begin."""
        self._submitted_tokens = 0
        self._first: float | None = None
        self._between: list[tuple[float, int]] = []
        self._last: dict[int, float] = {}
        self._counted: dict[int, int] = {}

    def submitted(self, prompt: Any) -> None:
        """The engine has the request from now on. prompt: an input of vLLM's, with or without token ids."""
        now, known = time.time(), prompt if isinstance(prompt, dict) else {}
        # vLLM counts from when the prompt was tokenized, which may be long before there was a free sequence.
        self._arrived_at = time.monotonic() - (now - known.get("arrival_time", now))
        self._submitted_tokens = len(known.get("prompt_token_ids") or ())

    def abandoned(self) -> None:
        """The client went away. The prompt counts as submitted, even if no output has reported it."""
        self.prompt_tokens = self.prompt_tokens or self._submitted_tokens

    @property
    def tokens_so_far(self) -> int:
        """Tokens of the prompt, from its submission on, and those that outputs reported."""
        return (self.prompt_tokens or self._submitted_tokens) + self.generation_tokens

    def add_output(self, output: Any) -> str | None:
        """Count one output of the engine; returns the finish reason if it is the last."""
        now, self.has_output = time.monotonic(), True
        if output.prompt_token_ids is not None:
            self.prompt_tokens = len(output.prompt_token_ids)
        reason: str | None = None
        for part in output.outputs:
            self._count(part.index, len(part.token_ids), now)
            reason = part.finish_reason or reason
        if output.finished:
            self.finished = True
            if self._kind == AT_ONCE and output.metrics is not None:
                self._take_timestamps(output.metrics)
        return reason if output.finished else None

    def report(self, metrics: RequestMetrics, adapter: str | None) -> None:
        """Report the latencies to the metrics."""
        if self._first is not None:
            metrics.first_token(adapter, self._first)
        for seconds, tokens in self._between:
            metrics.inter_token(adapter, seconds, tokens)

    def _count(self, index: int, tokens: int, now: float) -> None:
        if self._kind != STREAMED:
            tokens -= self._counted.get(index, 0)
            self._counted[index] = self._counted.get(index, 0) + tokens
        if tokens <= 0:
            return
        self.generation_tokens += tokens
        if self._kind == AT_ONCE:
            return
        if self._first is None:
            self._first = now - self.began
        if index in self._last:
            self._between.append((now - self._last[index], tokens))
        elif tokens > 1:  # out together with the first
            self._between.append((0.0, tokens - 1))
        self._last[index] = now

    def _take_timestamps(self, stamps: Any) -> None:
        """vLLM's own times of a request that was not streamed; of several choices, those of the one that ended last."""
        if stamps.first_token_latency > 0:
            self._first = self._arrived_at - self.began + stamps.first_token_latency
        gaps = [tokens - 1 for tokens in self._counted.values() if tokens > 1]
        if gaps and stamps.last_token_ts > stamps.first_token_ts > 0:
            each = (stamps.last_token_ts - stamps.first_token_ts) / max(gaps)
            self._between += [(each * number, number) for number in gaps]
