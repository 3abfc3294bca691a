"""Owns the arithmetic score of a running server: `python -m server.demo.evaluate --base-url URL --model NAME ...`.

Asks each named model the held-out additions through the OpenAI client, greedily, several at a time.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from server.demo.additions import ANSWER_TOKENS, HELD_OUT, Addition, count_right, held_out
from server.demo.errors import DemoError, run_command

if TYPE_CHECKING:
    from openai import AsyncOpenAI

AT_ONCE = 16
PATIENCE_SECONDS = 300.0
NO_KEY = "none"


class Score(NamedTuple):
    """The result of one model: right answers of those asked, and how long all of them took."""

    model: str
    right: int
    asked: int
    seconds: float


async def score_models(client: "AsyncOpenAI", models: Iterable[str], additions: list[Addition]) -> list[Score]:
    """The scores of the models, one model after the other."""
    return [await score(client, model, additions) for model in models]


async def score(client: "AsyncOpenAI", model: str, additions: list[Addition]) -> Score:
    """Ask one model every addition, at most `AT_ONCE` at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(addition: Addition) -> str:
        async with room:
            return await answer(client, model, addition.question)

    started = time.monotonic()
    answers = await asyncio.gather(*(ask(addition) for addition in additions))
    return Score(model, count_right(additions, answers), len(additions), time.monotonic() - started)


async def answer(client: "AsyncOpenAI", model: str, question: str) -> str:
    """One greedy answer."""
    completion = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_tokens=ANSWER_TOKENS,
    )
    return completion.choices[0].message.content or ""


async def explained(work: Awaitable[list[Score]], base_url: str) -> list[Score]:
    """The result of `work`. Raises DemoError for each kind of error that the client raises."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    try:
        return await work
    except APITimeoutError:
        raise DemoError(f"the server at {base_url} did not answer within {PATIENCE_SECONDS:.0f} s") from None
    except APIConnectionError:
        raise DemoError(f"no server answers at {base_url}: start one first (make serve)") from None
    except APIStatusError as problem:
        raise DemoError(f"the server at {base_url} answered {problem.status_code}: {problem.message}") from None


def table(scores: list[Score]) -> str:
    """The scores as text, one line each."""
    widest = max(len("model"), *(len(score.model) for score in scores))
    lines = [f"{'model':<{widest}}  {'right':>9}  {'accuracy':>8}  {'seconds':>7}"]
    for name, right, asked, seconds in scores:
        lines.append(f"{name:<{widest}}  {f'{right}/{asked}':>9}  {right / asked:>8.1%}  {seconds:>7.1f}")
    return "\n".join(lines)


async def evaluate(base_url: str, api_key: str, models: list[str], questions: int) -> list[Score]:
    """Score the named models of the server at `base_url`."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=PATIENCE_SECONDS) as client:
        return await explained(score_models(client, models, held_out(questions)), base_url)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.demo.evaluate", description="Ask a running server's models the held-out additions."
    )
    parser.add_argument("--base-url", required=True, help="for example http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=NO_KEY, help="if the server requires one")
    parser.add_argument("--questions", type=int, default=HELD_OUT, help="how many to ask (default: %(default)s)")
    parser.add_argument("--model", action="append", required=True, help="a served name; repeatable")
    given = parser.parse_args(arguments)
    if not 1 <= given.questions <= HELD_OUT:
        parser.error(f"--questions: found {given.questions}, expected 1 to {HELD_OUT}")

    def run() -> None:
        print(table(asyncio.run(evaluate(given.base_url, given.api_key, given.model, given.questions))))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
