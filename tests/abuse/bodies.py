"""A6 and A4: bodies as large, wide and deep as the server lets them be, from twenty clients at once."""

import json
from collections.abc import Callable
from typing import Any

from server.bodies.limits import BodyLimits
from tests.abuse.target import Attack, Ends, Target, post_all

CLIENTS = 20
LIMITS = BodyLimits(384)
"""Of tests/server/tiny_server, with the limits as they are by default."""
ROOM = LIMITS.body_bytes - 512
"""Bytes of a body beside the fields that each one has."""
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def filled(piece: str, most: int = 10**9) -> str:
    """As many pieces as a body holds, with commas between, at most so many."""
    return ",".join([piece] * min(most, ROOM // (len(piece) + 1)))


def properties(count: int) -> str:
    return ",".join(f'"property {number}": {{"type": "string"}}' for number in range(count))


def tool(count: int) -> str:
    """A tool with so many properties."""
    parameters = f'{{"type": "object", "properties": {{{properties(count)}}}}}'
    return f'{{"type": "function", "function": {{"name": "f", "parameters": {parameters}}}}}'


def message(length: int) -> str:
    return f'{{"role":"user","content":"{"t3 " * (length // 3)}"}}'


def parts(kind: str, count: int) -> str:
    """A message of so many parts."""
    part = f'{{"type":"{kind}","text":"t"}}'
    return f'{{"role":"user","content":[{",".join([part] * count)}]}}'


MESSAGES = '"messages": [{"role": "user", "content": "t3"}]'
BIASES = ",".join(f'"{number}": 1' for number in range(80_000))
UNKNOWN = ",".join(f'"field {number}": [{{}}, 1]' for number in range(45_000))
CALLS = '{"role":"assistant","tool_calls":[{}],"content":[{},{}]}'
BODIES: dict[str, tuple[str, Callable[[], str]]] = {
    "tiny messages": (CHAT, lambda: f'"messages": [{filled(message(0))}]'),
    "as many messages as there may be": (CHAT, lambda: f'"messages": [{filled(message(450), LIMITS.items)}]'),
    "messages of many parts": (CHAT, lambda: f'"messages": [{filled(parts("text", 600))}]'),
    "a message that is a deep list": (CHAT, lambda: f'"messages": [{"[" * (ROOM // 2)}{"]" * (ROOM // 2)}]'),
    "lists as deep as they may be": (CHAT, lambda: f'{MESSAGES}, "metadata": [{filled("[" * 60 + "]" * 60)}]'),
    "tools with thousands of properties": (CHAT, lambda: f'{MESSAGES}, "tools": [{tool(28_000)}]'),
    "tools as large as they may be": (CHAT, lambda: f'{MESSAGES}, "tools": [{",".join([tool(1_300)] * 4)}]'),
    "thousands of tools": (CHAT, lambda: f'{MESSAGES}, "tools": [{filled(tool(1))}]'),
    "a bias for tokens that there are not": (CHAT, lambda: f'{MESSAGES}, "logit_bias": {{{BIASES}}}'),
    "metadata": (CHAT, lambda: f'{MESSAGES}, "metadata": {{{properties(28_000)}}}'),
    "unknown fields": (CHAT, lambda: f"{MESSAGES}, {UNKNOWN}"),
    "wrong tool calls": (CHAT, lambda: f'"messages": [{filled(CALLS, LIMITS.items)}]'),
    "token ids": (COMPLETIONS, lambda: f'"prompt": [{filled("5")}]'),
    "token ids to be truncated": (
        COMPLETIONS, lambda: f'"prompt": [{filled("5", LIMITS.token_ids)}], "truncate_prompt_tokens": 4',
    ),
    "prompts of one token": (COMPLETIONS, lambda: f'"prompt": [{filled("[5]")}]'),
    "one giant string": (COMPLETIONS, lambda: f'"prompt": "{"t3 " * (ROOM // 3)}"'),
    "one giant string of escapes": (COMPLETIONS, lambda: '"prompt": "' + r"\u0074\n" * (ROOM // 8 - 2) + '"'),
    "a long number": (COMPLETIONS, lambda: f'"prompt": "t3", "seed": {"9" * ROOM}'),
    "long numbers": (COMPLETIONS, lambda: f'"prompt": "t3", "metadata": [{filled("9" * 300)}]'),
    "wrong input items": (RESPONSES, lambda: f'"input": [{filled("{}", LIMITS.items)}]'),
    "as many input items as there may be": (
        RESPONSES, lambda: f'"input": [{filled(parts("input_text", 8), LIMITS.items)}]',
    ),
    "an unknown model": (CHAT, lambda: f'"model": "nobody", "messages": [{filled(message(450))}]'),
}  # fmt: skip
"""Name -> the route, and the fields beside the model."""


def at_the_limit(name: str) -> Attack:
    """Twenty clients send that body at once."""
    path, make = BODIES[name]

    async def attack(target: Target) -> Ends:
        fields = make()
        model = "" if '"model"' in fields else f'"model": {json.dumps(target.base)}, '
        most = "" if path == RESPONSES else '"max_tokens": 1, '
        body = f"{{{model}{most}{fields}}}"
        assert len(body) <= LIMITS.body_bytes
        return await post_all(target, path, [body.encode()] * CLIENTS)

    return attack


async def over_the_limit(target: Target) -> Ends:
    """Bodies of 64 MiB, of which none is read."""
    body = b'{"model": "' + target.base.encode() + b'", "x": "' + b"a" * 64 * 1024**2 + b'"}'
    return await post_all(target, COMPLETIONS, [body] * 4)


async def sequences(target: Target) -> Ends:
    """More sequences than one request may ask for, and as many as it may, left at once."""
    one: dict[str, Any] = {"model": target.base, "prompt": "t3", "max_tokens": 100}
    many: list[bytes | dict[str, Any]] = [
        one | {"n": 16384},
        one | {"prompt": ["t3"] * 1024},
        one | {"prompt": ["t3"] * 60, "n": 60},
    ]
    ends = await post_all(target, COMPLETIONS, many)
    return ends + await post_all(target, COMPLETIONS, [one | {"n": 64}] * 2, leave_after_s=1)


ATTACKS: dict[str, Attack] = {f"body: {name}": at_the_limit(name) for name in BODIES} | {
    "body: over the limit": over_the_limit,
    "sequences": sequences,
}
EXPECTED: dict[str, set[str]] = {name: {"200", "400"} for name in ATTACKS} | {
    "body: over the limit": {"413", "reset"},
    "body: an unknown model": {"404"},
    "sequences": {"400", "left", "200", "429"},
}
