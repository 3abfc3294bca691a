"""Owns how text is tokenized: bounded by what the model's length can mean, and one long text at a time.

`install` wraps the renderer of vLLM's server, through which every route's text is tokenized. Short texts go on in
vLLM's own thread; long ones take turns in a thread of ours. Invariant: a long text never holds up a short one, and
takes no more memory than a text of LENGTHS times the model's length.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.errors import ContextLengthError, InvalidRequestError

LONG_TEXT = 64 * 1024
"""Characters up to which a text is short: it takes about 0.05 s."""
PIECE = 16 * 1024
LENGTHS = 4
"""A text of certainly more than this many times the model's length in tokens is not tokenized as a whole. Where the
model's length itself is the limit, vLLM says so."""

Refuse = Callable[[InvalidRequestError], Exception]


class TextTurns:
    """Tokenizes texts for one renderer. refuse: what to raise for a text that is too long."""

    def __init__(self, max_model_len: int, refuse: Refuse) -> None:
        self._max_model_len, self._refuse = max_model_len, refuse
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="long-texts")

    def install(self, renderer: Any) -> None:
        """Wrap the renderer's tokenization permanently; a renderer without a tokenizer gets no text."""
        if renderer.tokenizer is None:
            return
        inner: Callable[[Any, Any], Awaitable[Any]] = renderer._tokenize_prompt_async
        most = self._max_model_len * renderer.tokenizer.max_chars_per_token

        async def tokenize(prompt: Any, params: Any) -> Any:
            text: str = prompt["prompt"]
            if len(text) > most:
                raise self._refuse(_too_long(f"{len(text)} characters", f"{most}, the longest that", self))
            if len(text) <= LONG_TEXT:
                return await inner(prompt, params)
            async with self._turn:  # first come, first served; a caller that leaves frees its place
                await self._check_tokens(renderer.tokenizer, text)
                return await self._run(renderer._tokenize_prompt, prompt, params)

        renderer._tokenize_prompt_async = tokenize

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    async def _check_tokens(self, tokenizer: Any, text: str) -> None:
        """Count the tokens piece by piece, up to the first too many. A cut within a token may add some."""
        most = LENGTHS * self._max_model_len
        if len(text) <= most:
            return
        found = 0
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            ids = await self._run(_token_ids, tokenizer, piece)
            found += max(0, ids - 2 * tokenizer.max_chars_per_token)
            if found > most:
                raise self._refuse(_too_long(f"more than {found} tokens", f"{self._max_model_len} tokens,", self))

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _token_ids(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _too_long(found: str, expected: str, turns: TextTurns) -> ContextLengthError:
    return ContextLengthError(
        f"found a text of {found}, expected at most {expected} {turns.max_model_len} tokens can hold; shorten it"
    )
