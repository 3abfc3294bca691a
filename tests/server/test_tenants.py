"""Cached prefixes belong to one version and one tenant, and `allowed_keys` decides at every request."""

import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.streams import clear_case
from tests.server.tiny_server import BASE_NAME, BLOCK, Answer, Samples, TinyClient, long_prompt

LENGTH = 200
WHOLE = (LENGTH - 1) // BLOCK * BLOCK
"""Tokens of a prompt of LENGTH that the cache can hold."""
GENERATING: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 4},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 4},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
}


@pytest.fixture
def poet(admin: TinyClient, tmp_path: Path) -> Iterator[str]:
    """An adapter with one version."""
    assert admin.upload("poet", tiny_server.adapter(tmp_path / "poet", seed=1)).status_code == 201
    yield "poet"
    admin.remove("poet")


def cached(answer: Answer) -> int:
    """Prompt tokens that came from the cache."""
    count: int = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return count


def hits(admin: TinyClient) -> float:
    """vLLM's own count of them, of all requests so far."""
    return Samples.of(admin.metrics()).total("vllm:prefix_cache_hits_total")


def test_no_version_uses_anothers_blocks_and_going_back_finds_its_own(
    admin: TinyClient, alice: TinyClient, poet: str, tmp_path: Path
) -> None:
    prompt, before, one = long_prompt(101, LENGTH), hits(admin), admin.adapter(poet)["active"]
    first, again = alice.complete(poet, prompt), alice.complete(poet, prompt)
    assert (first.model, cached(first), cached(again)) == (f"poet@{one}", 0, WHOLE) and again.tokens == first.tokens
    assert admin.upload(poet, tiny_server.adapter(tmp_path / "2", seed=2)).json()["active"] == one + 1
    second, again = alice.complete(poet, prompt), alice.complete(poet, prompt)
    assert (second.model, cached(second), cached(again)) == (f"poet@{one + 1}", 0, WHOLE)
    assert again.tokens == second.tokens != first.tokens
    pinned = alice.complete(f"poet@{one}", prompt)
    assert cached(pinned) == WHOLE and pinned.tokens == first.tokens
    admin.change(poet, active=one, if_active=one + 1)
    back = alice.complete(poet, prompt)
    assert (back.model, cached(back)) == (f"poet@{one}", WHOLE) and back.tokens == first.tokens
    assert hits(admin) - before == 4 * WHOLE


def test_equal_content_under_another_name_shares_nothing(
    admin: TinyClient, alice: TinyClient, poet: str, tmp_path: Path
) -> None:
    prompt = long_prompt(102, LENGTH)
    first = alice.complete(poet, prompt)
    try:
        assert admin.upload("twin", tiny_server.adapter(tmp_path / "twin", seed=1)).status_code == 201
        (mine,), (other,) = admin.adapter(poet)["versions"], admin.adapter("twin")["versions"]
        assert mine["digest"] == other["digest"]
        twin = alice.complete("twin", prompt)
        assert twin.tokens == first.tokens and cached(twin) == 0
        assert cached(alice.complete("twin", prompt)) == cached(alice.complete(poet, prompt)) == WHOLE
    finally:
        admin.remove("twin")


def test_a_recreated_name_finds_nothing_of_the_old(
    admin: TinyClient, alice: TinyClient, poet: str, tmp_path: Path
) -> None:
    prompt = long_prompt(103, LENGTH)
    first = alice.complete(poet, prompt)
    admin.remove(poet)
    assert admin.upload(poet, tiny_server.adapter(tmp_path / "again", seed=1)).status_code == 201
    again = alice.complete(poet, prompt)
    assert again.model != first.model and again.tokens == first.tokens and cached(again) == 0


@pytest.mark.parametrize("model", [BASE_NAME, "poet"])
def test_tenants_and_their_salts_are_apart(alice: TinyClient, bob: TinyClient, poet: str, model: str) -> None:
    prompt = long_prompt(104 if model == BASE_NAME else 105, LENGTH)
    first = alice.complete(model, prompt)
    answers = {
        "bob": bob.complete(model, prompt),
        "alice, another salt": alice.complete(model, prompt, cache_salt="s"),
        "bob, alice's salt": bob.complete(model, prompt, cache_salt="s"),
    }
    assert {who: cached(answer) for who, answer in answers.items()} == dict.fromkeys(answers, 0)
    assert all(answer.tokens == first.tokens for answer in answers.values()), "who asks changes no token"
    for client, salt in ((alice, {}), (bob, {}), (alice, {"cache_salt": "s"}), (bob, {"cache_salt": "s"})):
        assert cached(client.complete(model, prompt, **salt)) == WHOLE


def test_the_salt_that_the_engine_sees_opens_nothing(server: ServerProcess, alice: TinyClient, bob: TinyClient) -> None:
    prompt, secret = long_prompt(106, LENGTH), (server.log.parent / "store" / "secret").read_bytes()
    alice.complete(BASE_NAME, prompt)
    real = hmac.digest(secret, json.dumps(["alice", None]).encode(), "sha256").hex()
    assert cached(bob.complete(BASE_NAME, prompt, cache_salt=real)) == 0
    assert cached(alice.complete(BASE_NAME, prompt)) == WHOLE


@pytest.mark.parametrize("path", GENERATING)
def test_every_generating_route_is_salted(admin: TinyClient, alice: TinyClient, bob: TinyClient, path: str) -> None:
    words = " ".join(f"t{word}" for word in long_prompt(110 + list(GENERATING).index(path), LENGTH))
    body = {"model": BASE_NAME, "temperature": 0, **GENERATING[path](words)}

    def found(client: TinyClient, **more: Any) -> float:
        before = hits(admin)
        client.http.post(path, json=body | more).raise_for_status()
        return hits(admin) - before

    assert found(alice) == 0
    assert found(bob) == 0
    assert found(alice) >= WHOLE - BLOCK
    if path != "/v1/messages":  # it has no salt of the client's
        assert found(alice, cache_salt="s") == 0


@pytest.mark.parametrize("salt", ["", 7, ["s"]])
def test_a_salt_that_is_none_is_refused(alice: TinyClient, salt: Any) -> None:
    body = TinyClient.body(BASE_NAME, [3, 4], 2, cache_salt=salt)
    assert alice.refusal("POST", "/v1/completions", json=body)[0] == 400


# allowed_keys


def asked(client: TinyClient, name: str, version: int = 1) -> dict[str, tuple[int, str | None]]:
    """What a key is told on every route that takes an adapter's name."""
    text = {"model": name, "prompt": "t3 t4", "max_tokens": 2}
    chat = {"model": name, "messages": [{"role": "user", "content": "t3 t4"}], "max_tokens": 2}
    http = client.http
    responses = {
        "adapter": http.get(f"/v1/adapters/{name}"),
        "version": http.get(f"/v1/adapters/{name}/versions/{version}"),
        "model": http.get(f"/v1/models/{name}"),
        "pinned model": http.get(f"/v1/models/{name}@{version}"),
        "completion": http.post("/v1/completions", json=text),
        "pinned": http.post("/v1/completions", json=text | {"model": f"{name}@{version}"}),
        "stream": http.post("/v1/completions", json=text | {"stream": True}),
        "chat": http.post("/v1/chat/completions", json=chat),
        "response": http.post("/v1/responses", json={"model": name, "input": "t3 t4", "max_output_tokens": 2}),
        "message": http.post("/v1/messages", json=chat),
        "message tokens": http.post("/v1/messages/count_tokens", json=chat),
        "tokenize": http.post("/tokenize", json={"model": name, "prompt": "t3 t4"}),
        "detokenize": http.post("/detokenize", json={"model": name, "tokens": [3, 4]}),
    }
    return {what: (response.status_code, _code(response)) for what, response in responses.items()}


def _code(response: httpx.Response) -> str | None:
    return None if response.status_code == 200 else response.json()["error"]["code"]


def listed(client: TinyClient) -> tuple[set[str], set[str]]:
    """The names in the list of adapters, and in that of models."""
    adapters = {adapter["name"] for adapter in client.http.get("/v1/adapters").json()["data"]}
    return adapters, {model["id"] for model in client.http.get("/v1/models").json()["data"]}


NOT_FOUND = dict.fromkeys(
    ("model", "pinned model", "completion", "pinned", "stream", "chat", "response", "message", "message tokens"),
    (404, "model_not_found"),
) | {
    "adapter": (404, "adapter_not_found"),
    "version": (404, "adapter_not_found"),
    "tokenize": (404, "model_not_found"),
    "detokenize": (404, "model_not_found"),
}


def test_a_key_without_the_right_sees_nothing(admin: TinyClient, alice: TinyClient, bob: TinyClient, poet: str) -> None:
    assert admin.change(poet, allowed_keys=["alice"])["allowed_keys"] == ["alice"]
    version = admin.adapter(poet)["active"]
    assert asked(bob, poet, version) == NOT_FOUND == asked(bob, "nobody")
    assert listed(bob) == (set(), {BASE_NAME})
    for client in (alice, admin):
        assert set(asked(client, poet, version).values()) == {(200, None)}
        assert listed(client) == ({poet}, {BASE_NAME, poet})
    refused = bob.http.get(f"/v1/adapters/{poet}").json()["error"]["message"]
    assert refused == bob.http.get("/v1/adapters/nobody").json()["error"]["message"].replace("nobody", poet)


def test_a_changed_right_counts_at_the_next_request(
    admin: TinyClient, alice: TinyClient, bob: TinyClient, poet: str
) -> None:
    case = clear_case(alice, [poet], 200, seed=3)
    prompt, whole = case.prompt, case.answers[poet]
    for allowed in (["alice"], ["bob"], [], ["alice", "bob"], None):
        admin.change(poet, allowed_keys=allowed)
        who_may = ["alice", "bob"] if allowed is None else allowed
        for label, client in (("alice", alice), ("bob", bob)):
            status = client.http.post("/v1/completions", json=client.body(poet, prompt, 2)).status_code
            assert status == (200 if label in who_may else 404), (allowed, label)
            assert (poet in listed(client)[0]) is (label in who_may)
        assert admin.complete(poet, prompt, tokens=2).tokens == whole[:2]
    running = alice.stream(poet, prompt, tokens=200)
    tokens = [token for choice in next(running)["choices"] for token in choice["token_ids"] or ()]
    admin.change(poet, allowed_keys=["bob"])
    assert asked(alice, poet) == NOT_FOUND
    tokens += [token for event in running for choice in event["choices"] for token in choice["token_ids"] or ()]
    assert tokens == whole, "what was admitted goes on to its end"


def test_only_the_admin_changes_rights(admin: TinyClient, alice: TinyClient, bob: TinyClient, poet: str) -> None:
    admin.change(poet, allowed_keys=["alice"])
    for client in (alice, bob):
        refused = client.refusal("PATCH", f"/v1/adapters/{poet}", json={"allowed_keys": None})
        assert refused == (403, "forbidden")
    assert admin.adapter(poet)["allowed_keys"] == ["alice"]
