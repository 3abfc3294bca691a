"""Owns asking a running server: greedy answers of one model to many questions, some at a time.

Invariant: a question that got no answer raises; it never counts as a wrong answer.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perft.errors import InputError
from perft.reading import parse_json
from perft.training.encoding import alpaca_prompt
from server.evaluation.connection import Connection, Server
from server.evaluation.tasks import Question

Template = Literal["chat", "alpaca"]
EXPECTED = {
    "chat": 'a chat completion, {"model": ..., "choices": [{"message": {"content": ...}}]}',
    "alpaca": 'a completion, {"model": ..., "choices": [{"text": ...}]}',
}


@dataclass(frozen=True)
class Asking:
    """How questions are asked. at_once: requests at a time. say: takes a line for the user while a request waits."""

    template: Template
    max_tokens: int
    at_once: int
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Answered:
    """One answer, and the model that gave it as the server names it (`NAME@VERSION`)."""

    text: str
    model: str


async def look(server: Server, models: Sequence[str]) -> None:
    """Raises InputError, within seconds, for no server, a refused key, and models that the server does not have."""
    async with Connection(server) as connection:
        await connection.look(models)


async def ask_all(
    server: Server, model: str, questions: Sequence[Question], how: Asking, keep: Callable[[int, Answered], None]
) -> None:
    """Hand each answer to `keep`, with its question's index, as it comes. Raises InputError for the first refusal."""
    remaining = iter(enumerate(questions))
    async with Connection(server, how.at_once, how.say) as connection:

        async def ask_next() -> None:
            for index, question in remaining:
                keep(index, await _ask(connection, model, question, how))

        workers = [asyncio.create_task(ask_next()) for _ in range(min(how.at_once, len(questions)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _ask(connection: Connection, model: str, question: Question, how: Asking) -> Answered:
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": how.max_tokens}
    if how.template == "chat":
        asked = f"{question.instruction}\n\n{question.context}" if question.context else question.instruction
        path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": asked}]}
    else:
        path, body = "/v1/completions", body | {"prompt": alpaca_prompt(question.instruction, question.context)}
    reply = await connection.post(path, body)
    if reply.status != 200:
        raise connection.refusal(reply, model)
    answered = _answer(reply.content, how.template)
    if answered is None:
        raise connection.strange(reply, path, EXPECTED[how.template])
    return answered


def _answer(content: bytes, template: Template) -> Answered | None:
    """The answer in a reply; None if it is something else."""
    try:
        found = parse_json(content, "the answer")
    except InputError:
        return None
    match template, found:
        case "chat", {"model": str(model), "choices": [{"message": {"content": str(text)}}, *_]}:
            return Answered(text, model)
        case "chat", {"model": str(model), "choices": [{"message": {"content": None}}, *_]}:
            return Answered("", model)  # a reasoning model that came to no answer within its tokens
        case "alpaca", {"model": str(model), "choices": [{"text": str(text)}, *_]}:
            return Answered(text, model)
    return None
