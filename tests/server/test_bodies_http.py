"""Bodies that nobody means, many at once, against the real server: each is answered, none is an error of its own."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from tests.server import nasty, tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.test_error_shapes import CONTENT, GENERATING
from tests.server.tiny_server import KEYS, Samples, TinyClient

MODELS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": AnthropicMessagesRequest,
}
SHORT = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens"}
CLIENTS = 16
EVERY = 7
"""One in so many bodies is sent; tests/server/test_bodies sends all of them, without an engine."""


@pytest.fixture(scope="module")
def poet(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    client = TinyClient(server.url)
    folder = tiny_server.adapter(tmp_path_factory.mktemp("bodies") / "poet", 5)
    client.upload("bodies-poet", folder).raise_for_status()
    yield "bodies-poet"
    client.remove("bodies-poet")
    client.close()


def test_every_route_that_generates_is_tried() -> None:
    assert {route.path for route in GENERATING} == MODELS.keys()


@pytest.mark.parametrize("path", MODELS)
def test_every_kind_of_value_in_every_field(server: ServerProcess, poet: str, admin: TinyClient, path: str) -> None:
    valid = {"model": poet} | CONTENT[path] | ({SHORT[path]: 4} if path in SHORT else {"max_output_tokens": 4})
    bodies = list(nasty.bodies(TypeAdapter(MODELS[path]).json_schema(), valid))[::EVERY]
    before = Samples.of(admin.metrics())
    found: list[tuple[str, int, str]] = []

    async def send(client: httpx.AsyncClient, left: list[tuple[str, bytes]]) -> None:
        while left:
            place, body = left.pop()
            response = await client.post(path, content=body, headers={"content-type": "application/json"})
            if response.status_code not in (200, 400):
                found.append((place, response.status_code, response.text))

    async def send_all() -> None:
        headers = {"Authorization": f"Bearer {KEYS['alice']}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=LIMIT_S) as client:
            await asyncio.gather(*(send(client, bodies) for _ in range(CLIENTS)))

    asyncio.run(send_all())
    assert not found and not bodies
    assert server.process.poll() is None and admin.http.get("/ready").status_code == 200
    seen = Samples.of(admin.metrics()) - before
    for reason in ("error", "internal_error", "adapter_output_invalid"):
        assert seen.total("perft_adapter_requests_total", finish_reason=reason) == 0
