"""The openai client as it is, against the real server: what it lists, asks, streams, and what it raises."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.tiny_server import BASE_NAME, KEYS, TinyClient

NAME = "bard"
WORDS = [{"role": "user", "content": "t3 t4 t5"}]
WORD = re.compile(r"( ?t\d+)+")


def client_of(server: ServerProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def version(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The second version of the adapter, which is active; the first is there too."""
    owner = TinyClient(server.url)
    folder = tmp_path_factory.mktemp("contract")
    first = owner.upload(NAME, tiny_server.adapter(folder / "1", seed=71)).json()["active"]
    assert owner.upload(NAME, tiny_server.adapter(folder / "2", seed=72)).json()["active"] == first + 1
    yield first + 1
    owner.remove(NAME)
    owner.close()


@pytest.fixture(scope="module")
def alice(server: ServerProcess, version: int) -> Iterator[openai.OpenAI]:
    with client_of(server, KEYS["alice"]) as client:
        yield client


def chat(client: openai.OpenAI, model: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"messages": WORDS, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(model=model, **(settings | options))


def test_models_are_listed_and_found(alice: openai.OpenAI, version: int) -> None:
    models = {model.id: model.model_dump() for model in alice.models.list()}
    assert set(models) == {BASE_NAME, NAME}
    assert models[NAME]["parent"] == BASE_NAME and models[BASE_NAME]["parent"] is None
    assert not any("/" in str(model["root"]) for model in models.values())
    for name in (BASE_NAME, NAME, f"{NAME}@{version}", f"{NAME}@{version - 1}"):
        assert alice.models.retrieve(name).id == name


def test_chat_by_adapter_says_which_version_answered(alice: openai.OpenAI, version: int) -> None:
    base, active = chat(alice, BASE_NAME), chat(alice, NAME)
    pinned, older = chat(alice, f"{NAME}@{version}"), chat(alice, f"{NAME}@{version - 1}")
    assert [answer.model for answer in (base, active, pinned, older)] == [
        BASE_NAME, f"{NAME}@{version}", f"{NAME}@{version}", f"{NAME}@{version - 1}",
    ]  # fmt: skip
    texts = [answer.choices[0].message.content for answer in (base, active, pinned, older)]
    assert texts[1] == texts[2] and len(set(texts)) == 3 and all(WORD.fullmatch(text) for text in texts)
    assert active.usage.prompt_tokens == 3 and active.usage.completion_tokens <= 12


@pytest.mark.parametrize("model", [BASE_NAME, NAME])
def test_a_stream_says_the_same_and_ends_with_the_usage(alice: openai.OpenAI, version: int, model: str) -> None:
    whole = chat(alice, model)
    chunks = list(chat(alice, model, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {BASE_NAME if model == BASE_NAME else f"{NAME}@{version}"}
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])


@pytest.mark.parametrize("model", [BASE_NAME, NAME])
def test_n_and_seed(alice: openai.OpenAI, model: str) -> None:
    def sampled(seed: int) -> list[str]:
        answer = chat(alice, model, n=3, seed=seed, temperature=1.0)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert sampled(7) == sampled(7) != sampled(8)
    assert len(set(sampled(7))) > 1


@pytest.mark.parametrize("model", [BASE_NAME, NAME])
def test_logprobs(alice: openai.OpenAI, model: str) -> None:
    answer = chat(alice, model, logprobs=True, top_logprobs=4, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens and all(len(token.top_logprobs) == 4 for token in tokens)
    assert all(token.logprob == max(other.logprob for other in token.top_logprobs) <= 0 for token in tokens)
    completion = alice.completions.create(model=model, prompt="t3 t4 t5", max_tokens=5, temperature=0, logprobs=2)
    assert completion.choices[0].text == answer.choices[0].message.content
    found, expected = completion.choices[0].logprobs.token_logprobs, [token.logprob for token in tokens]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", [BASE_NAME, NAME])
def test_stop(alice: openai.OpenAI, model: str) -> None:
    free = chat(alice, model, extra_body={"ignore_eos": True})
    words = free.choices[0].message.content.split()
    assert free.choices[0].finish_reason == "length" and len(words) == 12
    stopped = chat(alice, model, stop=[f"{words[4]} {words[5]}"], extra_body={"ignore_eos": True})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.split() == words[: words.index(words[4]) if words[4] in words[:4] else 4]


STRUCTURED: dict[str, tuple[dict[str, Any], str]] = {
    "choice": ({"choice": ["t5", "t6", "t7"]}, "t5|t6|t7"),
    "regex": ({"regex": "(t5|t6)(t8|t9)"}, "(t5|t6) ?(t8|t9)"),
    "grammar": ({"grammar": 'root ::= "t8" | "t9" root'}, "(t9 ?)*t8"),
}


@pytest.mark.parametrize("model", [BASE_NAME, NAME])
@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_outputs(alice: openai.OpenAI, model: str, kind: str) -> None:
    """With what the words t0 ... t127 can spell; JSON is tried on the demo's model."""
    wanted, pattern = STRUCTURED[kind]
    answer = chat(alice, model, extra_body={"structured_outputs": wanted}, max_tokens=40, temperature=1.0, seed=5)
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, answer.choices[0].message.content.strip())


def test_responses(alice: openai.OpenAI, version: int) -> None:
    answer = alice.responses.create(model=NAME, input="t3 t4 t5", max_output_tokens=12, temperature=0)
    assert answer.model == f"{NAME}@{version}" and answer.output_text == chat(alice, NAME).choices[0].message.content
    events = list(
        alice.responses.create(model=NAME, input="t3 t4 t5", max_output_tokens=12, temperature=0, stream=True)
    )
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.model == f"{NAME}@{version}"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text


def test_tokenize_and_back(alice: openai.OpenAI) -> None:
    """No methods of the client's, but its transport."""
    root = str(alice.base_url).removesuffix("v1/")
    values = alice.post(f"{root}tokenize", cast_to=httpx.Response, body={"model": NAME, "prompt": "t3 t99"}).json()
    assert values["tokens"] == [3, 99] and values["count"] == 2
    back = alice.post(f"{root}detokenize", cast_to=httpx.Response, body={"model": NAME, "tokens": [3, 99]}).json()
    assert back["prompt"] == "t3 t99"


# Errors


ASKED: dict[str, Callable[[openai.OpenAI, str], Any]] = {
    "chat": chat,
    "stream": lambda client, model: chat(client, model, stream=True),
    "completion": lambda client, model: client.completions.create(model=model, prompt="t3", max_tokens=2),
    "response": lambda client, model: client.responses.create(model=model, input="t3", max_output_tokens=2),
    "retrieve": lambda client, model: client.models.retrieve(model),
}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("model", ["nobody", f"{NAME}@99999", f"{NAME}@", "Bard", "../etc/passwd", f"{BASE_NAME}@1"])
def test_an_unknown_model_is_not_found(alice: openai.OpenAI, kind: str, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ASKED[kind](alice, model)
    error = refused.value
    assert error.status_code == 404 and error.code == "model_not_found" and error.param == "model"
    assert error.type == "invalid_request_error" and model in error.message


@pytest.mark.parametrize("kind", ASKED)
def test_a_wrong_key_is_refused(server: ServerProcess, kind: str) -> None:
    with client_of(server, "wrong-key-0123456789") as stranger, pytest.raises(openai.AuthenticationError) as refused:
        ASKED[kind](stranger, BASE_NAME)
    assert refused.value.code == "invalid_api_key" and "wrong-key" not in refused.value.message


def test_what_is_the_admins_is_forbidden(server: ServerProcess, alice: openai.OpenAI) -> None:
    url = f"{server.url}/v1/adapters/{NAME}"
    for ask in (
        lambda: alice.patch(url, cast_to=httpx.Response, body={"active": 1}),
        lambda: alice.delete(url, cast_to=httpx.Response),
        lambda: alice.get(f"{server.url}/metrics", cast_to=httpx.Response),
    ):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            ask()
        assert refused.value.code == "forbidden"


BAD: dict[str, Callable[[openai.OpenAI], Any]] = {
    "max_tokens": lambda client: chat(client, NAME, max_tokens=-1),
    "temperature": lambda client: chat(client, NAME, temperature=-1),
    "temperature of text": lambda client: chat(client, NAME, temperature="hot"),
    "too long": lambda client: client.completions.create(model=NAME, prompt=[3] * 400),
    "tokens out of the vocabulary": lambda client: client.completions.create(model=NAME, prompt=[3, 10**6]),
    "no messages": lambda client: chat(client, NAME, messages=None),
    "salt": lambda client: chat(client, NAME, extra_body={"cache_salt": ""}),
    "regex": lambda client: chat(client, NAME, extra_body={"structured_outputs": {"regex": "("}}),
    "a model that is a number": lambda client: chat(client, 7),  # type: ignore[arg-type]
    "a body that is a list": lambda client: client.post("/chat/completions", cast_to=httpx.Response, body=[]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_told_so(alice: openai.OpenAI, kind: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        BAD[kind](alice)
    body = refused.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"} and body["message"]
    assert body["code"] == ("context_length_exceeded" if kind == "too long" else "invalid_request")
    assert body["type"] == "invalid_request_error"


def test_a_conflict_is_told_so(server: ServerProcess, version: int) -> None:
    url = f"{server.url}/v1/adapters/{NAME}"
    with client_of(server, KEYS["admin"]) as owner:
        for ask, code in (
            (
                lambda: owner.patch(url, cast_to=httpx.Response, body={"active": version, "if_active": 1}),
                "active_changed",
            ),
            (lambda: owner.delete(f"{url}/versions/{version}", cast_to=httpx.Response), "version_active"),
        ):
            with pytest.raises(openai.ConflictError) as refused:
                ask()
            assert refused.value.code == code


def test_an_adapter_whose_output_is_no_number(server: ServerProcess, admin: TinyClient, tmp_path: Path) -> None:
    """500 at once; in a stream an error in the place of the tokens, which the client raises."""
    assert admin.upload("enormous", tiny_server.enormous_adapter(tmp_path / "e")).status_code == 201
    try:
        with client_of(server, KEYS["bob"]) as bob:
            with pytest.raises(openai.InternalServerError) as refused:
                chat(bob, "enormous")
            with pytest.raises(openai.APIError) as streamed:
                list(chat(bob, "enormous", stream=True))
        for error in (refused.value, streamed.value):
            assert error.code == "adapter_output_invalid" and error.type == "server_error"
            assert error.message and "enormous@" in error.message
    finally:
        admin.remove("enormous")
