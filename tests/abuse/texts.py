"""A5: texts as long as a body can be, on every route that tokenizes, from clients that wait and clients that leave."""

from collections import Counter
from typing import Any

from tests.abuse.bodies import CLIENTS, ROOM
from tests.abuse.target import Attack, Ends, Target, post_all

LONG = "t3 " * (ROOM // 3 - 100)
ONE_WORD = "x" * (ROOM - 300)
LETTERS = "\u00e9\u4e2d" * (ROOM // 12 - 100)
USER = {"role": "user", "content": LONG}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/tokenize": [{"prompt": LONG}, {"prompt": ONE_WORD}, {"prompt": LETTERS}, {"messages": [USER]}],
    "/v1/completions": [
        {"prompt": LONG, "max_tokens": 1},
        {"prompt": LONG, "max_tokens": 1, "truncate_prompt_tokens": 8},
        {"prompt": [LONG[: ROOM // 100]] * 90, "max_tokens": 1},
        {"prompt": "t3", "suffix": LONG, "max_tokens": 1},
        {"prompt": "t3", "stop": [LONG], "max_tokens": 1},
        {"prompt": "t3", "bad_words": ["t3 " * 80] * 128, "max_tokens": 1},
        {"prompt": "t3", "bad_words": ["t3 "] * 100_000, "max_tokens": 1},
    ],
    "/v1/chat/completions": [
        {"messages": [USER], "max_tokens": 1, "truncate_prompt_tokens": -1},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": LONG}]}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": "t3"}], "documents": [{"text": LONG}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": "t3"}], "chat_template_kwargs": {"a": LONG}, "max_tokens": 1},
        {"messages": [USER], "chat_template_kwargs": {"tokenize": True, "padding": "max_length", "max_length": 10**9}},
    ],
    "/v1/responses": [{"input": LONG}, {"input": "t3", "instructions": LONG}],
    "/v1/messages": [
        {"messages": [USER], "max_tokens": 1},
        {"messages": [{"role": "user", "content": "t3"}], "system": LONG, "max_tokens": 1},
        {"messages": [{"role": "user", "content": "t3"}], "stop_sequences": ["t3" * 500] * 900, "max_tokens": 1},
    ],
    "/v1/messages/count_tokens": [{"messages": [USER]}],
    "/detokenize": [{"tokens": [5] * (ROOM // 4)}],
}


async def _send(target: Target, path: str, times: int, leave_after_s: float | None = None) -> Ends:
    bodies: list[bytes | dict[str, Any]] = [{"model": target.base} | body for body in REQUESTS[path]]
    return await post_all(target, path, (bodies * times)[:times], leave_after_s)


def on(path: str) -> Attack:
    """Twenty clients at once on one route."""

    async def attack(target: Target) -> Ends:
        return await _send(target, path, CLIENTS)

    return attack


async def left_alone(target: Target) -> Ends:
    """Every text, each left soon, again and again: nothing of it may go on."""
    ends: Ends = Counter()
    for _ in range(3):
        for path in REQUESTS:
            ends += await _send(target, path, CLIENTS, leave_after_s=0.2)
    return ends


ATTACKS: dict[str, Attack] = {f"text: {path}": on(path) for path in REQUESTS} | {"texts, left": left_alone}
EXPECTED: dict[str, set[str]] = {name: {"200", "400"} for name in ATTACKS} | {"texts, left": {"200", "400", "left"}}
