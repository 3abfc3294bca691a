"""An adapter of finite but enormous weights ends its own requests, and nobody else's answers change by a token."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess, wait_until
from tests.server.streams import clear_case
from tests.server.tiny_server import BASE_NAME, BLOCK, KEYS, Answer, Samples, TinyClient, long_prompt

LENGTH = 120
WHOLE = (LENGTH - 1) // BLOCK * BLOCK
TOKENS = 64
TOLD = (500, "adapter_output_invalid")
ATTACKS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "completion": lambda: ("/v1/completions", {"prompt": long_prompt(220), "max_tokens": 16}),
    "two choices": lambda: (
        "/v1/completions", {"prompt": long_prompt(221), "max_tokens": 16, "n": 2, "temperature": 1},
    ),
    "two prompts": lambda: ("/v1/completions", {"prompt": [[3, 4], long_prompt(222)], "max_tokens": 16}),
    "logprobs": lambda: ("/v1/completions", {"prompt": [3, 4, 5], "max_tokens": 4, "logprobs": 3}),
    "sampled": lambda: ("/v1/completions", {"prompt": [3, 4, 5], "max_tokens": 4, "temperature": 1, "top_p": 0.5}),
    "one token": lambda: ("/v1/completions", {"prompt": [3], "max_tokens": 1}),
    "chat": lambda: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "t3 t4"}], "max_tokens": 4}),
}  # fmt: skip
REQUESTS = {name: 2 if name == "two prompts" else 1 for name in ATTACKS}
"""How many requests of the engine each of them is: the end of one takes those beside it along."""


@pytest.fixture
def clients(server: ServerProcess) -> Iterator[dict[str, TinyClient]]:
    found = {label: TinyClient(server.url, key) for label, key in KEYS.items()}
    yield found
    for client in found.values():
        client.close()


@pytest.fixture
def adapters(admin: TinyClient, tmp_path: Path) -> Iterator[None]:
    """Two sound adapters and the enormous one, which is accepted."""
    folders = {"sound": tiny_server.adapter(tmp_path / "1", 11), "sonnet": tiny_server.adapter(tmp_path / "2", 12)}
    folders |= {"enormous": tiny_server.enormous_adapter(tmp_path / "enormous")}
    for name, folder in folders.items():
        assert admin.upload(name, folder).status_code == 201
    yield
    admin.remove(*folders)


def ended(admin: TinyClient) -> Samples:
    return Samples.of(admin.metrics())


def errors_told(client: TinyClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The error objects of an answer, streamed or not."""
    response = client.http.post(path, json=body)
    if response.headers["content-type"].startswith("application/json"):
        return [response.json()["error"] | {"status": response.status_code}]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [event["error"] for event in map(json.loads, lines) if "error" in event]


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("kind", ATTACKS)
def test_its_requests_end_with_an_error(admin: TinyClient, clients: dict[str, TinyClient], kind: str) -> None:
    path, body = ATTACKS[kind]()
    before = ended(admin)
    plain = clients["bob"].refusal("POST", path, json={"model": "enormous", **body})
    streamed = errors_told(clients["bob"], path, {"model": "enormous", "stream": True, **body})
    assert plain == TOLD
    assert streamed and {error["code"] for error in streamed} == {TOLD[1]}
    assert all("enormous@" in error["message"] for error in streamed)
    counted = ended(admin) - before
    total = "perft_adapter_requests_total"
    invalid = counted.total(total, adapter="enormous", finish_reason=TOLD[1])
    beside_it = counted.total(total, adapter="enormous", finish_reason="abort")
    assert invalid >= 2 and invalid + beside_it == counted.total(total, adapter="enormous") == 2 * REQUESTS[kind]
    assert REQUESTS[kind] > 1 or not beside_it
    assert counted.total("perft_adapter_generation_tokens_total", adapter="enormous") == 0


@pytest.mark.usefixtures("adapters")
def test_nobody_elses_answers_change(admin: TinyClient, clients: dict[str, TinyClient]) -> None:
    """Before, during and after; after too from the blocks that were cached before."""
    alice, bob = clients["alice"], clients["bob"]
    others = [  # with a clear lead: who runs beside them, and so the rounding, is a matter of chance
        (client, model, clear_case(client, [model], TOKENS, 230 + number, LENGTH).prompt)
        for number, (client, model) in enumerate(
            (client, model) for client in (alice, bob) for model in (BASE_NAME, "sound", "sonnet")
        )
    ]

    def ask(other: tuple[TinyClient, str, list[int]]) -> Answer:
        client, model, prompt = other
        return client.complete(model, prompt, TOKENS)

    before = [ask(other) for other in others]
    start = ended(admin)
    with ThreadPoolExecutor(len(others) + 2) as pool:
        during = [pool.submit(client.stream_tokens, model, prompt, TOKENS) for client, model, prompt in others]
        poisoned = 0
        while poisoned < 10 or not all(future.done() for future in during):
            body = TinyClient.body("enormous", long_prompt(240 + poisoned, 250), 16)
            asked = [pool.submit(bob.refusal, "POST", "/v1/completions", json=body) for _ in range(2)]
            assert [future.result() for future in asked] == [TOLD, TOLD]
            poisoned += 2
    assert [future.result() for future in during] == [answer.tokens for answer in before]
    after = [ask(other) for other in others]
    assert [answer.tokens for answer in after] == [answer.tokens for answer in before]
    cached = [answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in after]
    assert cached == [WHOLE] * len(others), "what was cached before is still there, and used"
    counted = ended(admin) - start
    assert counted.total("perft_adapter_requests_total", adapter="enormous", finish_reason=TOLD[1]) == poisoned
    assert counted.total("perft_adapter_requests_total", finish_reason="length") == 2 * len(others)
    wait_until(lambda: admin.http.get("/ready").status_code == 200)


@pytest.mark.usefixtures("adapters")
def test_its_other_version_answers(admin: TinyClient, clients: dict[str, TinyClient], tmp_path: Path) -> None:
    """The name serves again once a sound version is active, and the enormous one still ends alone."""
    bob, prompt, bad = clients["bob"], long_prompt(250), admin.adapter("enormous")["active"]
    expected = bob.complete("sound", prompt)
    assert admin.upload("enormous", tiny_server.adapter(tmp_path / "sound", 11)).json()["active"] == bad + 1
    assert bob.complete("enormous", prompt).tokens == expected.tokens
    body = TinyClient.body(f"enormous@{bad}", prompt, 16)
    assert bob.refusal("POST", "/v1/completions", json=body) == TOLD
    again = bob.complete("enormous", prompt)
    assert again.tokens == expected.tokens and again.usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.usefixtures("adapters")
def test_a_dead_end_of_a_grammar_is_not_the_adapters(admin: TinyClient, clients: dict[str, TinyClient]) -> None:
    """No word of the vocabulary goes on after `t3 `: the engine ends the request, and the grammar is the client's."""
    before = ended(admin)
    body = TinyClient.body("sound", [3, 4], 8, structured_outputs={"regex": "t3 q"})
    del body["ignore_eos"]
    status, code = clients["bob"].refusal("POST", "/v1/completions", json=body)
    assert (status, code) == (400, "invalid_request")
    streamed = errors_told(clients["bob"], "/v1/completions", body | {"stream": True})
    assert streamed and all(error["code"] == "invalid_request" for error in streamed)
    counted = ended(admin) - before
    assert counted.total("perft_adapter_requests_total", adapter="sound", finish_reason="invalid_request") == 2
    assert counted.total("perft_adapter_requests_total", finish_reason="error") == 0
    assert counted.total("perft_adapter_requests_total", finish_reason=TOLD[1]) == 0
