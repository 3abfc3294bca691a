"""Many sequences: n times prompts at the limit, hundreds of requests of one key, clients that leave, and the herd."""

import asyncio
from collections import Counter
from random import Random
from typing import Any

from tests.abuse.target import Attack, Ends, Target, post, post_all

MOST = 128
"""Sequences of one request, as the server allows them by default."""
WORDS = [5, 9, 42]


def body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": WORDS, "max_tokens": 100, "ignore_eos": True, "temperature": 1, **more}


async def most_choices(target: Target) -> Ends:
    """As many choices as are allowed, of several requests at once, streamed and at once."""
    bodies = [body(target.base, n=MOST, stream=number % 2 == 0) for number in range(4)]
    return await post_all(target, "/v1/completions", [*bodies])


async def most_prompts(target: Target) -> Ends:
    """As many prompts as are allowed, and prompts times choices."""
    prompts = [[1 + number % 100, 9] for number in range(MOST)]
    bodies = [body(target.base, prompt=prompts), body(target.adapters[0], prompt=prompts[: MOST // 8], n=8)]
    return await post_all(target, "/v1/completions", [*bodies])


async def too_many(target: Target) -> Ends:
    """More than is allowed, in each way."""
    chat = {"model": target.base, "messages": [{"role": "user", "content": "t5"}], "n": 16_384}
    ends = await post_all(target, "/v1/chat/completions", [chat])
    far_too_many = [body(target.base, n=2000), body(target.base, n=16_384, prompt=[WORDS] * 1024)]
    return ends + await post_all(target, "/v1/completions", [*far_too_many])


async def queue(target: Target) -> Ends:
    """Five hundred requests of one key at once, on the base and on adapters."""
    models = (target.base, *target.adapters)
    return await post_all(
        target, "/v1/completions", [body(models[number % len(models)], max_tokens=30) for number in range(500)]
    )


async def leaving(target: Target) -> Ends:
    """Requests whose clients leave while they wait, or run, or stream."""
    random, ends = Random(8), Counter[str]()

    async def come_and_leave(number: int) -> None:
        more = {"n": random.choice([1, 16]), "stream": number % 3 == 0, "max_tokens": 300}
        async with target.client() as client:
            model = random.choice((target.base, *target.adapters))
            ends[await post(client, "/v1/completions", body(model, **more), random.uniform(0.01, 2.0))] += 1

    await asyncio.gather(*(come_and_leave(number) for number in range(60)))
    return ends


async def herd(target: Target) -> Ends:
    """Interleaved requests on several adapters."""
    bodies = [body(target.adapters[number % len(target.adapters)], max_tokens=10) for number in range(300)]
    return await post_all(target, "/v1/completions", [*bodies])


ATTACKS: dict[str, Attack] = {
    "most_choices": most_choices,
    "most_prompts": most_prompts,
    "too_many_sequences": too_many,
    "queue_of_one_key": queue,
    "leaving_clients": leaving,
    "herd": herd,
}
EXPECTED = {
    "most_choices": {"200"},
    "most_prompts": {"200"},
    "too_many_sequences": {"400"},
    "queue_of_one_key": {"200"},
    "leaving_clients": {"200", "left"},
    "herd": {"200"},
}
