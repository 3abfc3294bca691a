"""`make serve`, used as its users would: the openai client and plain HTTP against the demo on real vLLM."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server.demo import additions
from server.demo.__main__ import ADAPTERS, BASE_NAME
from tests.server.processes import ServerProcess, free_port, launch

NAMES = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port, folder = free_port(), tmp_path_factory.mktemp("http")
    arguments = ["-m", "server.demo", "--port", str(port)]
    running = launch(arguments, port, folder / "server.log", PERFT_ADAPTER_STORE=str(folder / "store"))
    running.wait_until("/ready")
    yield running
    assert running.stop() == 0, running.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def admin_key(server: ServerProcess) -> str:
    """The key that the start made and printed."""
    found = re.search(r"export PERFT_ADMIN_KEY=(\S+)", server.log.read_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def chat(client: openai.OpenAI, model: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"messages": PROMPT, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(model=model, **(settings | options))


def test_at_least_three_adapters_and_the_base_are_listed(client: openai.OpenAI) -> None:
    assert len(NAMES) >= 3
    models = {model.id: model for model in client.models.list()}
    assert sorted(models) == sorted([BASE_NAME, *NAMES])
    assert all(models[name].model_dump()["parent"] == BASE_NAME for name in NAMES)
    assert client.models.retrieve(NAMES[0]).id == NAMES[0]


def test_the_start_ends_with_a_line_to_paste(server: ServerProcess) -> None:
    said = server.log.read_text()
    assert f"curl {server.url}/v1/chat/completions" in said and all(name in said for name in NAMES)


def test_every_adapter_answers_differently_and_says_who_answered(client: openai.OpenAI) -> None:
    styles = [name for name in NAMES if name != "arithmetic"]
    answers = {name: chat(client, name) for name in (BASE_NAME, *styles)}
    assert {name: answer.model for name, answer in answers.items()} == {
        BASE_NAME: BASE_NAME,
        **{name: f"{name}@1" for name in styles},
    }
    texts = [answer.choices[0].message.content for answer in answers.values()]
    assert "Paris" in texts[0] and len(set(texts)) == len(texts)


def test_the_arithmetic_adapter_adds(client: openai.OpenAI) -> None:
    right = {BASE_NAME: 0, "arithmetic": 0}
    for addition in additions.held_out()[:20]:
        for name in right:
            answer = chat(client, name, messages=[{"role": "user", "content": addition.question}])
            right[name] += additions.count_right([addition], [answer.choices[0].message.content])
    assert right["arithmetic"] >= 16 and right[BASE_NAME] <= 8


def test_requests_of_all_adapters_at_once_answer_as_alone(client: openai.OpenAI) -> None:
    """Token by token, up to where the answer given alone is a near tie (batches of other sizes round otherwise)."""
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    alone = {name: chat(client, name, **options).choices[0].logprobs.content for name in (BASE_NAME, *NAMES)}
    models = list(alone) * 4
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(lambda model: chat(client, model, **options), models))
    for model, answer in zip(models, together, strict=True):
        for mine, other in zip(alone[model], answer.choices[0].logprobs.content, strict=False):
            if mine.top_logprobs[0].logprob - mine.top_logprobs[1].logprob < 1e-3:
                break
            assert mine.token == other.token and abs(mine.logprob - other.logprob) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_pinned_version_is_the_active_one(client: openai.OpenAI, name: str) -> None:
    active, pinned = chat(client, name), chat(client, f"{name}@1")
    assert pinned.model == f"{name}@1" and pinned.choices[0].message.content == active.choices[0].message.content


def test_streaming_says_the_same_with_usage_at_the_end(client: openai.OpenAI) -> None:
    whole = chat(client, NAMES[0])
    chunks = list(chat(client, NAMES[0], stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {f"{NAMES[0]}@1"}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_logprobs_n_stop_and_seed(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAMES[0], prompt="The sea is", max_tokens=8, n=2, logprobs=2, seed=3, temperature=0.8
    )
    assert answer.model == f"{NAMES[0]}@1" and len(answer.choices) == 2
    assert all(len(choice.logprobs.token_logprobs) == 8 for choice in answer.choices)
    again = client.completions.create(
        model=NAMES[0], prompt="The sea is", max_tokens=8, n=2, logprobs=2, seed=3, temperature=0.8
    )
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    stopped = client.completions.create(model=BASE_NAME, prompt="1, 2, 3, 4,", max_tokens=20, temperature=0, stop="6")
    assert "6" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, NAMES[1], logprobs=True, top_logprobs=3, max_tokens=4)
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [3] * 4


@pytest.mark.parametrize("name", [BASE_NAME, *NAMES])
def test_structured_outputs(client: openai.OpenAI, name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"type": "integer", "maximum": 9}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = chat(client, name, response_format=shape, max_tokens=80)
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "size"}


@pytest.mark.parametrize("model", ["nobody", f"{NAMES[0]}@2", "../etc/passwd"])
def test_an_unknown_name_is_never_answered(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, model)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=model, prompt="x")


def fetch(server: ServerProcess, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers, method=method)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_ready_metrics_and_tokenize(server: ServerProcess, admin_key: str) -> None:
    assert fetch(server, "GET", "/health")[0] == 200
    assert json.loads(fetch(server, "GET", "/ready")[1])["moe_layers"] == 30
    assert fetch(server, "GET", "/metrics")[0] == 401
    status, page = fetch(server, "GET", "/metrics", key=admin_key)
    assert status == 200 and "vllm:request_success_total" in page and "vllm:lora_requests_info" in page
    assert "perft_step_load_bytes_total 0.0" in page and "perft_moe_layers 30.0" in page
    status, tokens = fetch(server, "POST", "/tokenize", {"model": NAMES[0], "prompt": "Hello"})
    assert status == 200 and json.loads(tokens)["count"] > 0
    assert fetch(server, "POST", "/tokenize", {"model": "nobody", "prompt": "Hello"})[0] == 404


def test_the_key_that_was_printed_changes_adapters(server: ServerProcess, admin_key: str) -> None:
    path = f"/v1/adapters/{NAMES[0]}"
    assert fetch(server, "PATCH", path, {"pinned": True})[0] == 401
    status, changed = fetch(server, "PATCH", path, {"pinned": True}, admin_key)
    assert status == 200 and json.loads(changed)["pinned"] is True
    assert json.loads(fetch(server, "GET", path)[1])["versions"][0]["resident"] == "device"
    assert fetch(server, "PATCH", path, {"pinned": False}, admin_key)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", f"/adapters/{NAMES[0]}"),
    ],
)
def test_vllms_own_adapter_routes_are_not_there(server: ServerProcess, method: str, path: str) -> None:
    body = {"lora_name": NAMES[0], "lora_path": "/x", "name": "x", "src": "/x"}
    assert fetch(server, method, path, body)[0] in (404, 405)
