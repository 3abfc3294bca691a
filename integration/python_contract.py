"""The server's contract, checked with the openai Python client; js/contract.mjs is the same in JavaScript.

    BASE_URL=http://127.0.0.1:8000/v1 API_KEY=... ADMIN_KEY=... ADAPTER=pirate BASE=demo-base python python_contract.py

Prints one line per check and exits with 1 at the first failure. MAX_ADAPTER_BYTES and REQUESTS_AT_ONCE are limits of
the server.
"""

import json
import os
from pathlib import Path
from typing import Any

import openai

SETTINGS = os.environ
ADAPTER, BASE = SETTINGS["ADAPTER"], SETTINGS["BASE"]
KEYS = {"api": SETTINGS["API_KEY"], "admin": SETTINGS["ADMIN_KEY"], "wrong": "a-key-of-nobody"}
CLIENTS = {
    name: openai.OpenAI(base_url=SETTINGS["BASE_URL"], api_key=key, max_retries=0, timeout=500)
    for name, key in KEYS.items()
}
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 24,
}


def chat(model: str, **options: Any) -> Any:
    return CLIENTS["api"].chat.completions.create(model=model, **(QUESTION | options))


def models_are_listed() -> None:
    listed = {model.id: model.model_dump() for model in CLIENTS["api"].models.list()}
    assert {BASE, ADAPTER} <= set(listed)
    assert listed[ADAPTER]["parent"] == BASE and listed[BASE]["parent"] is None
    assert all("/" not in model["root"] for model in listed.values())
    assert CLIENTS["api"].models.retrieve(ADAPTER).id == ADAPTER


def an_adapter_and_the_base_answer() -> None:
    adapter, base = chat(ADAPTER), chat(BASE)
    assert adapter.model == f"{ADAPTER}@1" and base.model == BASE
    assert adapter.choices[0].message.content != base.choices[0].message.content
    assert adapter.usage.completion_tokens > 0


def a_pinned_version_answers_as_the_active_one() -> None:
    pinned, active = chat(f"{ADAPTER}@1"), chat(ADAPTER)
    assert pinned.model == f"{ADAPTER}@1"
    assert pinned.choices[0].message.content == active.choices[0].message.content


def a_stream_says_the_same_with_usage() -> None:
    whole = chat(ADAPTER)
    chunks = list(chat(ADAPTER, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {f"{ADAPTER}@1"}
    assert chunks[-1].usage == whole.usage


def every_listed_error_is_as_it_says() -> None:
    listed = Path(__file__).with_name("errors.json").read_text(encoding="utf-8").replace("$ADAPTER", ADAPTER)
    for case in json.loads(listed):
        client = CLIENTS[case["key"]]
        try:
            if case["method"] == "get":
                client.get(case["path"], cast_to=object)
            else:
                send = {"post": client.post, "patch": client.patch, "delete": client.delete}[case["method"]]
                send(case["path"], cast_to=object, body=case.get("body"))
        except openai.APIStatusError as error:
            check_error(case["name"], error, case["status"], case.get("code"))
        else:
            raise AssertionError(f"{case['name']}: it was answered")


def check_error(name: str, error: openai.APIStatusError, status: int, code: str | None) -> None:
    assert error.status_code == status, f"{name}: {error.status_code} {error.message}"
    assert isinstance(error.body, dict) and {"message", "type", "param", "code"} <= set(error.body), name
    assert error.body["message"], name
    assert code is None or error.code == code, f"{name}: {error.code}"


def upload(name: str, weights: bytes) -> None:
    CLIENTS["admin"].post(
        "/adapters",
        cast_to=object,
        body={"name": name},
        files=[("config", ("adapter_config.json", b"{}")), ("weights", ("adapter_model.safetensors", weights))],
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )


def a_bad_upload_is_refused() -> None:
    cases = [
        ("integration-broken", b"no safetensors", 400, "invalid_adapter"),
        ("Not A Name", b"no safetensors", 400, "invalid_name"),
        ("integration-large", bytes(int(SETTINGS["MAX_ADAPTER_BYTES"]) + 1), 413, "adapter_too_large"),
    ]
    for name, weights, status, code in cases:
        try:
            upload(name, weights)
        except openai.APIStatusError as error:
            check_error(name, error, status, code)
            assert isinstance(error.body, dict)
            assert code != "invalid_adapter" or error.body["violations"]
        else:
            raise AssertionError(f"{name}: it was taken")


def more_requests_at_once_than_the_key_has_are_refused() -> None:
    """A stream counts until it is closed; the server counts by key."""
    streams = [chat(BASE, stream=True, max_tokens=1900, extra_body={"ignore_eos": True}) for _ in range(at_once())]
    try:
        for stream in streams:
            next(iter(stream))
        chat(BASE)
    except openai.RateLimitError as error:
        check_error("too many at once", error, 429, "rate_limited")
        assert int(error.response.headers["retry-after"]) >= 1
    else:
        raise AssertionError("one request more than the limit was answered")
    finally:
        for stream in streams:
            stream.close()


def at_once() -> int:
    return int(SETTINGS["REQUESTS_AT_ONCE"])


CHECKS = (
    models_are_listed,
    an_adapter_and_the_base_answer,
    a_pinned_version_answers_as_the_active_one,
    a_stream_says_the_same_with_usage,
    every_listed_error_is_as_it_says,
    a_bad_upload_is_refused,
    more_requests_at_once_than_the_key_has_are_refused,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
        print(f"ok {check.__name__}", flush=True)
