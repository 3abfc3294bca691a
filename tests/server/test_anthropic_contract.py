"""The anthropic client as it is, against the real server: its answers, and the exceptions that it raises."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess
from tests.server.tiny_server import BASE_NAME, KEYS, TinyClient

WORDS: Any = [{"role": "user", "content": "t3 t4 t5"}]
LONG: Any = [{"role": "user", "content": "t3 " * 1000}]


def client_of(server: ServerProcess, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def alice(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with client_of(server, KEYS["alice"]) as client:
        yield client


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**({"model": BASE_NAME, "messages": WORDS, "max_tokens": 4} | options))


def test_an_answer_streamed_or_not(alice: anthropic.Anthropic) -> None:
    whole = ask(alice, extra_body={"temperature": 0})
    events = list(ask(alice, stream=True, extra_body={"temperature": 0}))
    assert events[0].type == "message_start" and events[-1].type == "message_stop"
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text and whole.model == BASE_NAME


WRONG: dict[str, tuple[Callable[[anthropic.Anthropic], Any], type[anthropic.APIStatusError], str, str]] = {
    "unknown model": (
        lambda client: ask(client, model="nobody"), anthropic.NotFoundError, "not_found_error", "model_not_found",
    ),
    "unknown model, counted": (
        lambda client: client.messages.count_tokens(model="nobody", messages=WORDS),
        anthropic.NotFoundError, "not_found_error", "model_not_found",
    ),
    "max_tokens": (
        lambda client: ask(client, max_tokens=-4),
        anthropic.BadRequestError, "invalid_request_error", "invalid_request",
    ),
    "temperature": (
        lambda client: ask(client, extra_body={"temperature": -3}),
        anthropic.BadRequestError, "invalid_request_error", "invalid_request",
    ),
    "temperature, streamed": (
        lambda client: list(ask(client, stream=True, extra_body={"temperature": -3})),
        anthropic.BadRequestError, "invalid_request_error", "invalid_request",
    ),
    "too long": (
        lambda client: ask(client, messages=LONG),
        anthropic.BadRequestError, "invalid_request_error", "context_length_exceeded",
    ),
    "too long, counted": (
        lambda client: client.messages.count_tokens(model=BASE_NAME, messages=LONG),
        anthropic.BadRequestError, "invalid_request_error", "context_length_exceeded",
    ),
}  # fmt: skip


def check(error: anthropic.APIStatusError, kind: str, code: str) -> None:
    body: Any = error.body
    assert body["type"] == "error" and body["error"]["type"] == kind and body["error"]["code"] == code
    assert body["error"]["message"] in str(error) and error.request_id == body["request_id"]


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_the_exception_of_its_kind(alice: anthropic.Anthropic, what: str) -> None:
    act, raised, kind, code = WRONG[what]
    with pytest.raises(raised) as refused:
        act(alice)
    check(refused.value, kind, code)


def test_a_wrong_key_is_refused(server: ServerProcess) -> None:
    with client_of(server, "wrong-key-0123456789") as stranger:
        for act in (ask, lambda client: list(ask(client, stream=True))):
            with pytest.raises(anthropic.AuthenticationError) as refused:
                act(stranger)
            check(refused.value, "authentication_error", "invalid_api_key")


def test_an_adapter_whose_output_is_no_number(server: ServerProcess, admin: TinyClient, tmp_path: Path) -> None:
    assert admin.upload("boundless", tiny_server.enormous_adapter(tmp_path / "e")).status_code == 201
    try:
        with client_of(server, KEYS["bob"]) as bob:
            for options in ({}, {"stream": True}):
                with pytest.raises(anthropic.InternalServerError) as refused:
                    list(ask(bob, model="boundless", **options))
                check(refused.value, "api_error", "adapter_output_invalid")
    finally:
        admin.remove("boundless")


def test_a_clients_mistakes_leave_no_traceback_in_the_log(server: ServerProcess, alice: anthropic.Anthropic) -> None:
    with open(server.log, encoding="utf-8") as log:
        log.seek(0, 2)
        for act, raised, _, _ in WRONG.values():
            with pytest.raises(raised):
                act(alice)
        assert "Traceback" not in log.read()
