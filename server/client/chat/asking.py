"""Owns one question to one model: the request, its stream read event by event, what is known of the answer meanwhile.

Invariant: whatever the server sends or does, the answer ends whole or with an error in it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from perft.errors import InputError
from perft.reading import parse_json
from server.client.connection import ClientError, Server

MOST_LINE_BYTES = 16 * 1024 * 1024
"""The longest event of a stream that is read."""
Message = dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """How a question is asked. temperature: None for the server's default."""

    max_tokens: int
    temperature: float | None = None


@dataclass
class Answer:
    """What a model has answered so far.

    asked: the model that was asked for, model: the one that answered. began, first, last: monotonic seconds of the
    request, of the first token and of the newest one. tokens: as the server counted them, at the end.
    """

    asked: str
    model: str = ""
    text: str = ""
    is_done: bool = False
    finish_reason: str = ""
    error: ClientError | None = None
    tokens: int | None = None
    has_hidden: bool = False
    """Whether it has reasoning beside its text."""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None

    @property
    def seconds_to_first(self) -> float | None:
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """From the first token to the last one."""
        if self.first is None or self.last is None or self.tokens is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else None


async def ask(
    http: httpx.AsyncClient, server: Server, messages: Sequence[Message], wanted: Wanted, answer: Answer
) -> None:
    """Fill an answer as it arrives."""
    body: dict[str, Any] = {
        "model": answer.asked, "messages": list(messages), "max_tokens": wanted.max_tokens, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if wanted.temperature is not None:
        body["temperature"] = wanted.temperature
    answer.began = time.monotonic()
    try:
        with server.sentences():
            async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise server.refusal(response)
                await _read(response, answer)
    except ClientError as error:
        answer.error = error
    except asyncio.CancelledError:
        answer.error = ClientError("interrupted")
        raise
    finally:
        answer.is_done = True


async def base_model(http: httpx.AsyncClient, server: Server) -> str:
    """The name of the base that a server has. Raises ClientError."""
    with server.sentences():
        response = await http.get(f"{server.url}/v1/models")
    if not response.is_success:
        raise server.refusal(response)
    try:
        match parse_json(response.content, "models"):
            case {"data": [*models]}:
                for model in models:
                    match model:
                        case {"id": str(name), "parent": None}:
                            return name
    except InputError:
        pass
    raise ClientError(f"{server.url} answered GET /v1/models with something other than a list that has the base")


async def _read(response: httpx.Response, answer: Answer) -> None:
    """Raises ClientError for an error in the stream, and for a stream that is none."""
    is_whole = False
    async for data in _events(response):
        if data == b"[DONE]":
            is_whole = True
            break
        try:
            event = parse_json(data, "event")
        except InputError:
            raise ClientError("the server sent an event that is no JSON") from None
        _take(event, answer)
    if not is_whole and not answer.finish_reason:
        raise ClientError("the stream ended before the answer did")


def _take(event: Any, answer: Answer) -> None:
    match event:
        case {"error": {"message": str(message), **rest}}:
            raise ClientError(message, code=str(rest.get("code") or ""))
    match event:
        case {"model": str(model)}:
            answer.model = model
    match event:
        case {"usage": {"completion_tokens": int(tokens)}}:
            answer.tokens = tokens
    match event:
        case {"choices": [{"delta": {**delta}, **choice}, *_]}:
            text = delta.get("content")
            hidden = delta.get("reasoning") or delta.get("reasoning_content")
            if isinstance(text, str) and text:
                answer.text += text
            answer.has_hidden |= bool(hidden)
            if text or hidden:
                answer.last = time.monotonic()
                answer.first = answer.first or answer.last
            answer.finish_reason = str(choice.get("finish_reason") or answer.finish_reason)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event. Lines end at a line feed alone: JSON may have Unicode's other line ends in it."""
    buffer = b""
    async for block in response.aiter_bytes():
        *lines, buffer = (buffer + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(buffer) > MOST_LINE_BYTES:
            raise ClientError("the server sent an event of more than 16 MiB")
