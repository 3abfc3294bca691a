"""The server of `adapter_api` with what `perft top` and `perft chat` ask for: readiness, metrics, models, streams."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server.adapter_api import AdapterApi, refusal

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil [bold red]x[/] \r\x08\x7f"
"""What a terminal would obey, hide or turn round, and what rich would read as markup."""
EVIL_SHOWN = "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202eevil [bold red]x[/]"

METRICS = """# TYPE perft_adapter_requests_total counter
perft_adapter_requests_total{{adapter="poet",finish_reason="stop"}} {count}
perft_adapter_requests_total{{adapter="poet",finish_reason="adapter_deleted"}} 3
# TYPE perft_adapter_generation_tokens_total counter
perft_adapter_generation_tokens_total{{adapter="poet"}} {count}
# TYPE perft_adapter_requests_running gauge
perft_adapter_requests_running{{adapter="tiny"}} 5
perft_adapter_requests_running{{adapter="poet"}} 7
# TYPE perft_adapter_requests_waiting gauge
perft_adapter_requests_waiting{{adapter="poet"}} 2
# TYPE perft_adapter_loads_total counter
perft_adapter_loads_total{{result="ok"}} 9
perft_adapter_loads_total{{result="failed"}} 1
# TYPE perft_device_rows_used gauge
perft_device_rows_used 500
# TYPE perft_device_rows_total gauge
perft_device_rows_total 2000
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="tiny"}} 12
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="tiny"}} 0.25
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1"}} {count}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf"}} {count}
# TYPE http_requests_total counter
http_requests_total{{handler="/v1/models",status="4xx"}} 4
"""


@dataclass
class LiveApi(AdapterApi):
    """answers: model -> the texts of its stream's events. errors: model -> code, before a stream (with the status
    `refused`) or (`midway`) in it. endless: models that never end.

    not_ready, metrics_refused: a message; path -> status. asked: path and query of every GET. chats: what was posted.
    knows_order: whether GET /v1/adapters has `sort`, `search` and `total`.
    """

    answers: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    midway: set[str] = field(default_factory=set)
    endless: set[str] = field(default_factory=set)
    not_ready: str = ""
    metrics_refused: dict[str, int] = field(default_factory=dict)
    list_refused: int = 0
    refused: int = 503
    knows_order: bool = True
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    count: int = 0
    may_answer: threading.Event = field(default_factory=threading.Event)
    """An upload is answered once it is set."""

    def app(self) -> Starlette:
        app = super().app()
        app.router.routes += [
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/console/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        return app

    def paths(self, path: str) -> list[dict[str, str]]:
        """The queries of the GETs of a path."""
        return [query for asked, query in self.asked if asked == path]

    async def upload(self, request: Request) -> Response:
        answer = await super().upload(request)
        while not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        return answer

    async def ready(self, request: Request) -> Response:
        self._note(request)
        return refusal(503, "engine_unavailable", self.not_ready) if self.not_ready else JSONResponse({})

    async def metrics(self, request: Request) -> Response:
        self._note(request)
        if status := self.metrics_refused.get(request.url.path):
            return refusal(status, "forbidden", "found a key that may not read metrics")
        self.count += 10
        return PlainTextResponse(METRICS.format(count=self.count))

    async def models(self, request: Request) -> Response:
        self._note(request)
        cards = [{"id": "tiny", "parent": None}, {"id": "poet", "parent": "tiny"}]
        return JSONResponse({"object": "list", "data": cards})

    async def list(self, request: Request) -> Response:
        self._note(request)
        query = request.query_params
        if self.list_refused:
            return refusal(self.list_refused, "invalid_api_key", "found no valid key")
        if not self.knows_order and query.keys() - {"limit", "after"}:
            return refusal(400, "invalid_request", "sort: unknown field")
        names = [name for name in sorted(self.adapters) if query.get("search", "") in name]
        limit = int(query["limit"])
        page = {"object": "list", "data": [self.adapters[name] for name in names[:limit]], "next": None}
        total = {"total": len(names)} if self.knows_order else {}
        return JSONResponse(page | {"has_more": len(names) > limit} | total)

    async def chat(self, request: Request) -> Response:
        asked = await request.json()
        self.chats.append(asked)
        self.keys.append(request.headers.get("authorization"))
        model = asked["model"]
        if model in self.errors and model not in self.midway:
            return refusal(self.refused, self.errors[model], f"it cannot be served {EVIL}")
        return StreamingResponse(self._events(model), media_type="text/event-stream")

    async def _events(self, model: str) -> AsyncIterator[str]:
        def event(value: dict[str, Any]) -> str:
            return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

        answered = f"{model}@1" if model != "tiny" else model
        yield event({"model": answered, "choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for text in self.answers.get(model, []):
            yield event({"model": answered, "choices": [{"delta": {"content": text}, "finish_reason": None}]})
            await asyncio.sleep(0.01)
        if model in self.midway:
            yield event({"error": {"message": "it was deleted", "type": "t", "param": None, "code": "adapter_deleted"}})
            return
        if model in self.endless:
            await asyncio.sleep(600)
        yield event({"model": answered, "choices": [{"delta": {}, "finish_reason": "stop"}]})
        yield event({"choices": [], "usage": {"completion_tokens": len(self.answers.get(model, []))}})
        yield "data: [DONE]\n\n"

    def _note(self, request: Request) -> None:
        self.asked.append((request.url.path, dict(request.query_params)))
