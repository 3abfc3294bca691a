"""Owns asking a running server: greedy answers of one model to many questions, some at a time.

Invariant: a question that got no answer raises; it never counts as a wrong answer.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from perft.errors import InputError
from perft.training.encoding import alpaca_prompt
from server.evaluation.tasks import Question

Template = Literal["chat", "alpaca"]
RETRIED = (429, 503)
TRIES = 6


@dataclass(frozen=True)
class Server:
    """Where to ask. url: without /v1."""

    url: str
    key: str | None
    timeout: float = 600.0


@dataclass(frozen=True)
class Answered:
    """One answer, and the model that gave it as the server names it (`NAME@VERSION`)."""

    text: str
    model: str


async def ask_all(
    server: Server, model: str, questions: Sequence[Question], template: Template, max_tokens: int, at_once: int,
    done: Callable[[], None],
) -> list[Answered]:  # fmt: skip
    """The answers in the questions' order. Raises InputError for what the server refuses."""
    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    room = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=server.timeout) as client:

        async def one(question: Question) -> Answered:
            async with room:
                found = await _ask(client, model, question, template, max_tokens)
                done()
                return found

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks]


async def _ask(
    client: httpx.AsyncClient, model: str, question: Question, template: Template, max_tokens: int
) -> Answered:
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}
    if template == "chat":
        asked = f"{question.instruction}\n\n{question.context}" if question.context else question.instruction
        path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": asked}]}
    else:
        path, body = "/v1/completions", body | {"prompt": alpaca_prompt(question.instruction, question.context)}
    response = await _answered(client, path, body)
    if response.is_error:
        raise InputError(f"the server answered {response.status_code} for {model}: {_message(response)}")
    found = response.json()
    choice = found["choices"][0]
    text = choice["message"]["content"] if template == "chat" else choice["text"]
    return Answered(text or "", found["model"])


async def _answered(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    """The response, once the server has room; a connection that broke is tried again."""
    broken: httpx.TransportError | None = None
    for attempt in range(TRIES):
        try:
            response = await client.post(path, json=body)
            if response.status_code not in RETRIED or attempt == TRIES - 1:
                return response
            wait = float(response.headers.get("Retry-After", 2**attempt))
        except httpx.TransportError as error:
            broken, wait = error, 0.2 * 2**attempt
        await asyncio.sleep(wait)
    reason = str(broken) or type(broken).__name__
    raise InputError(f"the server at {client.base_url} did not answer: {reason}")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
