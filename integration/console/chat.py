"""Chat as the console's demo answers it on the fake engine: paced, counted, and at first alike for every adapter.

Each answer begins as the base's and parts from it after a few words, as an adapter's does; `x-image` answers in HTML.
"""

import asyncio
import json
import random
import time
import zlib
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse

from integration.console.contents import IMAGE
from server.api.error_responses import ContractRoute
from server.engine.protocol import EngineCounters
from server.inference.request_context import CURRENT, RequestContext
from server.metrics.counters import FIRST_TOKEN_BUCKETS, INTER_TOKEN_BUCKETS
from tests.server.fake_server import BASE_NAMES, engine_request

SENTENCES = [
    "The clause that you mean is in the fourth article of the treaty.",
    "It says who may use the harbour, and for how long.",
    "Ships of both sides pay the same dues.",
    "A ship that carries grain pays half of them.",
    "The harbour master keeps the register and shows it to whoever asks.",
    "In a storm every ship may enter, without any dues.",
    "What is not in the register was not paid.",
    "The treaty ends after ninety years unless both sides renew it.",
    "A later protocol changed the dues, not the rights.",
    "Nobody has asked for a renewal so far.",
]
STYLES = {
    "pirate": [
        "Arr, it be the fourth article, matey!",
        "Every ship pays, savvy?",
        "But a storm lets ye in for free.",
        "The harbour master has the ledger, and he be no friend o' mine.",
        "Ninety years, then we sail again.",
    ],
    "poet": [
        "The fourth of all the articles has kept",
        "the harbour open while the city slept;",
        "who carries grain shall pay but half the due,",
        "and when the storm is loud, let every crew",
        "come in and rest, and nobody shall ask",
        "what treaty gave the pilot such a task.",
    ],
}
"""Name -> what it says where it parts from the base; the others say the base's sentences in an order of their own."""
LABELS = ("model_name", "engine")
SAMPLES = (BASE_NAMES[0], "0")


class VllmMetrics:
    """The metrics of vLLM's that the console reads."""

    def __init__(self) -> None:
        def labelled(kind: Any, name: str, **more: Any) -> Any:
            return kind(name, name, LABELS, **more).labels(*SAMPLES)

        self.running = labelled(Gauge, "vllm:num_requests_running")
        self.waiting = labelled(Gauge, "vllm:num_requests_waiting")
        self.cache = labelled(Gauge, "vllm:kv_cache_usage_perc")
        self.prompt = labelled(Counter, "vllm:prompt_tokens")
        self.generated = labelled(Counter, "vllm:generation_tokens")
        self.first = labelled(Histogram, "vllm:time_to_first_token_seconds", buckets=FIRST_TOKEN_BUCKETS)
        self.between = labelled(Histogram, "vllm:inter_token_latency_seconds", buckets=INTER_TOKEN_BUCKETS)


@cache
def vllm_metrics() -> VllmMetrics:
    """One for the process, like vLLM's."""
    return VllmMetrics()


class Chat(BaseModel):
    """What is read of OpenAI's request."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None


def add_chat(app: FastAPI, pace: float = 1.0) -> None:
    """Serve POST /v1/chat/completions. pace: 0 for answers at once."""
    metrics = vllm_metrics()
    app.state.expert_tokens = dict[int, list[int]]()

    async def chat(body: Chat, request: Request) -> Any:
        context = CURRENT.get()
        assert context is not None
        words = tokens(body, context, request.app, metrics, pace)
        head = {"id": f"chatcmpl-{time.monotonic_ns():x}", "created": int(time.time()), "model": body.model}
        if body.stream:
            return StreamingResponse(events(words, head, body), media_type="text/event-stream")
        text = "".join([word async for word in words])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return head | {"object": "chat.completion", "choices": [choice], "usage": usage(body, len(text.split()))}

    app.router.add_api_route(
        "/v1/chat/completions", chat, methods=["POST"], include_in_schema=False, route_class_override=ContractRoute
    )


async def events(words: AsyncIterator[str], head: dict[str, Any], body: Chat) -> AsyncIterator[bytes]:
    head, count = head | {"object": "chat.completion.chunk"}, 0

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode()

    yield event({"role": "assistant", "content": ""})
    async for word in words:
        count += 1
        yield event({"content": word})
    yield event({}, "stop")
    if (body.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(body, count)})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def usage(body: Chat, generated: int) -> dict[str, int]:
    prompt = len(prompt_of(body).split())
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def prompt_of(body: Chat) -> str:
    return " ".join(str(message.get("content")) for message in body.messages)


async def tokens(
    body: Chat, context: RequestContext, app: FastAPI, metrics: VllmMetrics, pace: float
) -> AsyncIterator[str]:
    """The words of an answer, and their measurements."""
    version = context.version
    name = None if version is None else version.name
    counters, own = app.state.services.metrics, zlib.crc32((name or "base").encode())
    chance, text = random.Random(own), answer(prompt_of(body), body.model, name)
    limit = body.max_tokens or body.max_completion_tokens or 160
    text, reason = text[:limit], "length" if len(text) > limit else "stop"
    began, generated = context.began, 0
    metrics.running.inc()
    try:
        async with engine_request(app, context) as ended:
            await asyncio.sleep(pace * chance.uniform(0.05, 0.35))
            last = time.monotonic()
            counters.first_token(name, last - began)
            metrics.first.observe(last - began)
            for word in text:
                if generated:
                    await asyncio.sleep(pace * chance.uniform(0.012, 0.02 + own % 5 / 100))
                    now = time.monotonic()
                    counters.inter_token(name, now - last)
                    metrics.between.observe(now - last)
                    last = now
                if ended.is_set():
                    reason = "adapter_deleted"
                    break
                generated += 1
                metrics.generated.inc()
                if version is not None:
                    work(app, version.ref.engine_id, version.accepted, own)
                yield word
    except (asyncio.CancelledError, GeneratorExit):
        reason = "abort"
        raise
    finally:
        metrics.running.dec()
        metrics.prompt.inc(len(prompt_of(body).split()))
        metrics.cache.set(0.1 + 0.05 * metrics.running._value.get() % 0.9)
        counters.request_finished(
            name, reason, len(prompt_of(body).split()), generated, time.monotonic() - context.began
        )


def answer(prompt: str, model: str, name: str | None) -> list[str]:
    """The words of an answer with their spaces: a while the same for every model, then its own."""
    alike, own = random.Random(zlib.crc32(prompt.encode())), random.Random(zlib.crc32(f"{prompt}|{model}".encode()))
    begin = alike.sample(SENTENCES, alike.randrange(1, 3))
    words = " ".join(begin).split()
    rest = list(STYLES.get(name or "", []))
    more = [each for each in SENTENCES if each not in begin]
    rest = rest or own.sample(more, own.randrange(3, 6))
    words += " ".join(rest).split()
    if name in ("x-image", "x-script"):
        words[3:3] = IMAGE.split()
    if name == "json":
        words = json.dumps({"answer": rest[0], "article": 4, "years": own.randrange(99)}, indent=1).split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


def work(app: FastAPI, engine_id: int, accepted: Any, own: int) -> None:
    """One token more for the experts of a version: some adapters use them evenly, some do not."""
    config = None if accepted is None else accepted.config
    count = 1 if config is None else config.num_experts
    told: dict[int, list[int]] = app.state.expert_tokens
    mine = told.setdefault(engine_id, [0] * count)
    evenness = own % 4
    expert = 0 if evenness == 0 and random.random() < 0.9 else int(count * random.random() ** (1 + evenness / 2))
    mine[min(expert, count - 1)] += 1
    app.state.engine.counted = EngineCounters(0, {key: tuple(value) for key, value in told.items()})
