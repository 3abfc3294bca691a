"""What a request's body may hold: looked at once, bounded, refused with the reason, on every route that takes one."""

import asyncio
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.types import ASGIApp, Message

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.api.route_table import Route
from server.bodies import structure
from server.bodies.body_fields import BodyFields
from server.bodies.check import RequestBodies
from server.bodies.limits import KEPT_BYTES, MAX_DEPTH, BodyLimits
from server.bodies.receive import receive_body
from server.errors import InvalidRequestError, RequestTooLargeError
from server.hosting.environment import limit_sequences
from server.sharing.budget import BodyBudget
from server.sharing.turns import Turns
from tests.abuse.bodies import BODIES
from tests.server import nasty, tiny_server
from tests.server.fake_server import bearer, settings_of
from tests.server.fakes import BASE, FakeEngine
from tests.server.test_error_shapes import CONTENT, GENERATING, SELECTING, Asker, name_of, refused
from tests.server.tiny_server import Samples
from tests.server.virtual_time import run_virtually
from tests.server.vllm_app import running
from tests.synthetic import write_adapter

ROUTES = {route.path: route for route in SELECTING}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("bodies")
    model = tiny_server.build_model(folder / "model")
    made = write_adapter(folder / "adapter", BASE, 1)
    files = {"config": (made / CONFIG_FILE).read_bytes(), "weights": (made / WEIGHTS_FILE).read_bytes()}
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(model, settings_of(folder / "store"), FakeEngine())) as world,
    ):
        asker = Asker(portal, world)
        assert asker.ask("POST", "/v1/adapters", "admin", data={"name": "poet"}, files=files).status_code == 201
        yield asker


def sent(asker: Asker, route: Route, raw: bytes | str, **headers: str) -> httpx.Response:
    """A body as it is written."""
    return asker.ask("POST", route.path, content=raw, headers=JSON | headers)


def schema_of(asker: Asker, route: Route) -> dict[str, Any]:
    """Of the request model of a route of vLLM's app."""
    (there,) = (r for r in asker.world.app.routes if isinstance(r, APIRoute) and r.path == route.path)
    assert there.body_field is not None
    return TypeAdapter(there.body_field.field_info.annotation).json_schema()


# Every field, every value


def ends(asker: Asker) -> Samples:
    """How the adapters' requests ended, as GET /metrics says."""
    return Samples.of(asker.ask("GET", "/metrics", "admin").text)


async def post_to(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of a response. (A client of HTTP takes longer than the app, for thousands of requests.)"""
    headers = {"host": "127.0.0.1", "content-length": str(len(body))} | JSON | bearer("alice")
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "query_string": b"",
        "raw_path": path.encode(), "root_path": "", "client": ("127.0.0.1", 123), "server": ("127.0.0.1", 80),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    sent: list[Message] = []
    is_over = asyncio.Event()

    async def receive() -> Message:
        if body_left:
            return {"type": "http.request", "body": body_left.pop()}
        await is_over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            is_over.set()

    body_left = [body]
    with suppress(Exception):  # as httpx does: the response counts
        await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_no_value_of_any_field_is_an_error_of_the_servers(asker: Asker, route: Route) -> None:
    bodies = list(nasty.bodies(schema_of(asker, route), {"model": "poet"} | CONTENT[route.path]))

    async def ask_all() -> list[tuple[str, int, bytes]]:
        found = []
        for place, body in bodies:
            status, said = await post_to(asker.world.app, route.path, body)
            if status not in (200, 400):
                found.append((place, status, said))
        return found

    assert len(bodies) > 50 and not asker.portal.call(ask_all)
    seen = ends(asker)
    for reason in ("error", "internal_error"):
        assert seen.total("perft_adapter_requests_total", finish_reason=reason) == 0


USER = '"messages": [{"role": "user", "content": "t3"}]'
SEVERAL: dict[str, list[tuple[str, str]]] = {
    "/v1/chat/completions": [
        ('"messages": []', "messages"),
        ('"messages": [ ]', "messages"),
        ('"messages": [{"role": "user", "content": [{"input_audio": 5}]}]', "messages.0.content.0.input_audio"),
        ('"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": [1]}]}]', "messages"),
        ('"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]', ""),
        (
            '"messages": [{"role": "user", "content": "t3"}], "chat_template_kwargs": {"conversation": []}',
            "chat_template",
        ),
        (
            '"messages": [{"role": "user", "content": "t3"}], "chat_template_kwargs": {"tokenize": true}',
            "chat_template",
        ),
        ('"messages": [{"role": "user", "content": "t3"}], "chat_template_kwargs": {"max_length": 9}', "chat_template"),
        ('"messages": [{"role": "user", "content": "t3"}], "chat_template": "{{ 1 }}"', ""),
        ('"messages": [{"role": "user", "content": "t3"}], "tools": [], "tool_choice": "required"', "tool_choice"),
        ('"messages": [{"role": "user", "content": "t3"}], "functions": [{"name": "f"}]', "functions"),
        ('"messages": [{"role": "user", "content": "t3"}], "function_call": {"name": "f"}', "function_call"),
    ],
    "/v1/responses": [
        ('"input": []', "input"),
        ('"input": [{"role": "assistant", "type": "message", "content": []}]', "input.0.content"),
        ('"input": [{"role": "assistant", "id": "a", "status": "completed", "content": []}]', "input.0.content"),
        ('"input": "t3", "store": true', "store"),
        ('"input": "t3", "background": true', "background"),
        ('"input": "t3", "background": true, "store": true', "store"),
        ('"input": "t3", "previous_response_id": "resp_1"', "previous_response_id"),
        ('"input": "t3", "conversation": "conv_1"', "conversation"),
        ('"input": "t3", "conversation": {"id": "conv_1"}', "conversation"),
    ],
    "/v1/completions": [
        ('"prompt": "t3", "prompt_embeds": "AAAA"', "prompt_embeds"),
        ('"prompt": "t3", "best_of": 3', "best_of"),
        ('"prompt": "t3", "lora_request": {"lora_name": "a", "lora_path": "/"}', "lora_request"),
        ('"prompt": "t3", "adapter": "poet"', "adapter"),
        ('"prompt": "t3", "request_id": "a\\nb"', "request_id"),
        ('"prompt": "t3", "vllm_xargs": {"a": {}}', "vllm_xargs.a"),
    ],
    "/v1/messages": [
        ('"max_tokens": 4, "messages": []', "messages"),
        (f'"max_tokens": 4, {USER}, "tools": [], "tool_choice": {{"type": "any"}}', "tool_choice"),
    ],
}


@pytest.mark.parametrize(
    ("path", "fields", "param"), [(path, *case) for path, cases in SEVERAL.items() for case in cases]
)
def test_what_would_fail_inside_or_be_ignored(asker: Asker, path: str, fields: str, param: str) -> None:
    error = refused(sent(asker, ROUTES[path], f'{{"model": "poet", {fields}}}'), ROUTES[path], 400, "invalid_request")
    assert (error["param"] or "").startswith(param) and error["message"] != "the request is not valid"
    assert "VLLM_" not in error["message"] and "STORE" not in error["message"]


TOOL = {"name": "f", "parameters": {"type": "object"}}
CHAT_TOOLS = [{"type": "function", "function": TOOL}]
RESPONSE_TOOLS = [{"type": "function"} | TOOL]
MESSAGE_TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
NAMED, NAMED_THERE = {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}
TOOL_REQUESTS: list[tuple[str, list[Any], Any, str]] = [
    *(("/v1/chat/completions", CHAT_TOOLS, choice, "tools") for choice in (None, "auto")),
    *(("/v1/chat/completions", CHAT_TOOLS, choice, "tool_choice") for choice in ("required", NAMED)),
    *(("/v1/responses", RESPONSE_TOOLS, choice, "tools") for choice in (None, "auto")),
    *(("/v1/responses", RESPONSE_TOOLS, choice, "tool_choice") for choice in ("required", NAMED_THERE)),
    *(("/v1/messages", MESSAGE_TOOLS, choice, "tools") for choice in (None, {"type": "auto"})),
    ("/v1/messages", MESSAGE_TOOLS, {"type": "any"}, "tool_choice"),
    ("/v1/messages/count_tokens", MESSAGE_TOOLS, None, "tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "tools", "choice", "param"), TOOL_REQUESTS)
def test_tools_without_a_parser(
    asker: Asker, path: str, tools: list[Any], choice: Any, param: str, stream: bool
) -> None:
    changes = (
        {"tools": tools} | ({} if choice is None else {"tool_choice": choice}) | ({"stream": True} if stream else {})
    )
    error = refused(asker.post(ROUTES[path], **changes), ROUTES[path], 400, "invalid_request")
    assert error["param"] == param
    assert "--enable-auto-tool-choice --tool-call-parser" in error["message"] and "none" in error["message"]


@pytest.mark.parametrize(("path", "tools"), [(path, tools) for path, tools, choice, _ in TOOL_REQUESTS if not choice])
def test_tools_that_must_not_be_called_need_no_parser(asker: Asker, path: str, tools: list[Any]) -> None:
    if path != "/v1/messages/count_tokens":
        choice = {"type": "none"} if path == "/v1/messages" else "none"
        assert asker.post(ROUTES[path], tools=tools, tool_choice=choice).status_code == 200


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "code_interpreter", "mcp", "file_search", "x"])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_run_elsewhere_are_not_served(asker: Asker, kind: str, choice: str) -> None:
    route = ROUTES["/v1/responses"]
    tools = [{"type": kind, "server_label": "a", "container": {"type": "auto"}}]
    error = refused(asker.post(route, tools=tools, tool_choice=choice), route, 400, "invalid_request")
    assert error["param"] == "tools.0.type" and kind in error["message"] and "function" in error["message"]


def _of(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} | more]}


def _schema(**json_schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


CHAT, CALL = "/v1/chat/completions", {"id": "a", "type": "function"}
IMAGE = {"type": "image_url", "image_url": "http://a/b.png"}
TOLD: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": None}, "messages", "messages: found null, expected an array"),
    (CHAT, {"messages": {}}, "messages", "messages: found an object, expected an array"),
    (CHAT, _of("user", None), "messages.0.content", "messages.0.content: found null, expected a string or an array"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content",
     "messages.0.content: missing, expected a string or an array"),
    (CHAT, _of("system", None), "messages.0.content",
     "messages.0.content: found null, expected a string or an array"),
    ("/tokenize", {"prompt": None} | _of("user", None), "messages.0.content",
     "messages.0.content: found null, expected a string or an array"),
    (CHAT, _of("tool", "t3"), "messages.0.tool_call_id", "messages.0.tool_call_id: missing, expected a string"),
    (CHAT, _of("user", [{"type": "input_text", "text": "t3"}]), "messages.0.content.0.type",
     'messages.0.content.0.type: found "input_text", expected "text"'),
    (CHAT, _of("user", [{"text": "t3"}]), "messages.0.content.0.type",
     'messages.0.content.0.type: missing, expected "text"'),
    (CHAT, _of("user", [{"type": "text"}]), "messages.0.content.0.text",
     "messages.0.content.0.text: missing, expected a string"),
    (CHAT, _of("user", [{"type": "text", "text": 5}]), "messages.0.content.0.text",
     "messages.0.content.0.text: found 5, expected a string"),
    (CHAT, _of("user", ["t3"]), "messages.0.content.0", 'messages.0.content.0: found "t3", expected an object'),
    (CHAT, _of("user", [{"type": "text", "text": "t3"}, IMAGE]), "messages.0.content.1.image_url",
     'messages.0.content.1.image_url: found "http://a/b.png", expected an object'),
    (CHAT, _of("assistant", None, tool_calls=[{"id": "a"}]), "messages.0.tool_calls.0.function",
     "messages.0.tool_calls.0.function: missing, expected an object"),
    (CHAT, _of("assistant", None, tool_calls=[CALL | {"function": {"arguments": "{}"}}]),
     "messages.0.tool_calls.0.function.name", "messages.0.tool_calls.0.function.name: missing, expected a string"),
    (CHAT, _schema(schema={}), "response_format.json_schema.name",
     "response_format.json_schema.name: missing, expected a string"),
    (CHAT, _schema(name="a"), "response_format.json_schema.schema",
     "response_format.json_schema.schema: missing, expected an object"),
    ("/v1/completions", _schema(name="a", schema=None), "response_format.json_schema.schema",
     "response_format.json_schema.schema: found null, expected an object"),
    ("/v1/messages", {"max_tokens": 5000}, "max_tokens",
     "max_tokens=5000 cannot be greater than max_model_len=384. Please request fewer output tokens."),
    ("/v1/messages", _of("user", None), "messages.0.content",
     "messages.0.content: found null, expected a string or an array"),
    ("/v1/messages", _of("user", [{"type": "text"}]), "messages.0.content.0.text",
     "messages.0.content.0.text: missing, expected a string"),
    ("/v1/responses", {"input": None}, "input", "input: found null, expected a string or an array"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "text", "text": "t3"}]}]},
     "input.0.content.0.type", 'input.0.content.0.type: found "text", expected "input_text"'),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text",
     "input.0.content.0.text: missing, expected a string"),
    (CHAT, {"logprobs": True, "top_logprobs": 50}, "top_logprobs",
     "Requested sample logprobs of 50, which is greater than max allowed: 20"),
    (CHAT, {"stop": ["a"] * 5}, "stop", "stop: found 5 elements, expected at most 4"),
    (CHAT, {"kv_transfer_params": {"a": 1}}, "kv_transfer_params",
     "kv_transfer_params: this server does not have this field; leave it out"),
    (CHAT, {"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params",
     "vllm_xargs.kv_transfer_params: this server does not have this field; leave it out"),
    ("/v1/messages", {"ec_transfer_params": {"a": 1}}, "ec_transfer_params",
     "ec_transfer_params: this server does not have this field; leave it out"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities",
     'modalities: this server answers with text alone; leave it out or ["text"]'),
    (CHAT, {"audio": {"voice": "a", "format": "wav"}}, "audio",
     "audio: this server answers with text alone; leave it out"),
    (CHAT, {"web_search_options": {}}, "web_search_options",
     "web_search_options: this server does not search; leave it out"),
    (CHAT, {"store": True}, "store", "store: responses are not stored by this server; leave it out or false"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "changes", "param", "message"), TOLD)
def test_what_is_wrong_is_told_by_the_callers_field(
    asker: Asker, path: str, changes: dict[str, Any], param: str, message: str
) -> None:
    error = refused(asker.post(ROUTES[path], **changes), ROUTES[path], 400, "invalid_request")
    assert (error["param"], error["message"]) == (param, message)


TAKEN: list[dict[str, Any]] = [
    {"modalities": ["text"]}, {"store": False}, {"audio": None}, {"service_tier": "auto"}, {"kv_transfer_params": None},
    {"vllm_xargs": {"mine": 1}}, {"stop": ["a"] * 4}, _of("developer", "t3"), _of("ipython", "t3"),
    _of("user", [{"type": "text", "text": "t3"}]),
    {"messages": [{"role": "user", "content": "t3"},
                  {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{}"}}]},
                  {"role": "tool", "tool_call_id": "a", "content": "t3"}]},
    {"temperature": "0.5"},
]  # fmt: skip


@pytest.mark.parametrize("changes", TAKEN)
def test_what_is_right_is_answered(asker: Asker, changes: dict[str, Any]) -> None:
    response = asker.post(ROUTES[CHAT], **changes)
    assert response.status_code == 200, response.text


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend", "guided_x")


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize("field", GUIDED)
@pytest.mark.parametrize("value", [{"type": "object"}, {}, "[0-9]", ["a"], False])
def test_a_constraint_that_would_be_ignored(asker: Asker, route: Route, field: str, value: Any) -> None:
    error = refused(asker.post(route, **{field: value}), route, 400, "invalid_request")
    assert error["param"] == field
    assert any(word in error["message"] for word in ("structured_outputs", "response_format", "output_config"))
    assert asker.post(route, **{field: None}).status_code == 200


@pytest.mark.parametrize("fields", ["", ', "store": false', ', "store": null, "background": false'])
def test_a_response_is_never_stored(asker: Asker, fields: str) -> None:
    response = sent(asker, ROUTES["/v1/responses"], f'{{"model": "tiny", "input": "t3"{fields}}}')
    assert response.status_code == 200 and not response.json().get("store") and not response.json().get("background")
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
        assert asker.ask(method, f"/v1/responses/{response.json()['id']}{path}").status_code == 404


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
@pytest.mark.parametrize("choice", ["absent", None, "auto", "none"])
@pytest.mark.parametrize("tools", ["absent", None, []])
def test_no_tools_are_no_tools(asker: Asker, route: Route, choice: Any, tools: Any) -> None:
    if route.dialect == "anthropic" and isinstance(choice, str) and choice != "absent":
        choice = {"type": choice}
    fields = {name: value for name, value in (("tools", tools), ("tool_choice", choice)) if value != "absent"}
    assert asker.post(route, **fields).status_code == 200


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_unknown_fields_are_not_even_read(asker: Asker, route: Route) -> None:
    assert asker.post(route, made_up={"a": [1, 2]}, another=None).status_code == 200
    body = json.dumps({"model": "poet"} | CONTENT[route.path])[:-1]
    assert sent(asker, route, f'{body}, "made_up": [{"[1e999]," * 9999}1]}}').status_code == 200


# The look


LOOKS: dict[bytes, str] = {
    b"": "found an empty body", b"[]": "found an array", b"7": "found a number", b'{"a": NaN}': "NaN",
    b'{"a": "\\ud83d"}': "surrogate", b'{"\\udc00": 1}': "surrogate", b'{"a": {"b\\ud83d": 1}}': "surrogate",
    b'{"a": ["\\ud83d\\ud83d"]}': "surrogate", b'{"a": "\xff"}': "UTF-8", b'{"a": [{"\xed\xa0\x80": 1}]}': "UTF-8",
    b'{"a": "\x00"}': "not valid", b'{"a": 01}': "not valid", b'{"a": 1} {}': "not valid", b'{"a": }': "not valid",
    b'{"a": ' + b"[" * 100_000: "not valid",
}  # fmt: skip


@pytest.mark.parametrize(("body", "found"), LOOKS.items(), ids=lambda value: str(value[:24]))
def test_what_is_no_json_object_of_text(body: bytes, found: str) -> None:
    with pytest.raises(InvalidRequestError, match=found):
        BodyFields(body)


def test_what_is_written_is_what_was_looked_at() -> None:
    fields = BodyFields('\ufeff{"a": 1, "model": "x", "é": "\\u00e9\\ud83d\\ude00", "model" : [ 2 ]}'.encode())
    assert json.loads(fields.json()) == {"a": 1, "model": [2], "é": "é\U0001f600"} == dict(json.loads(fields.json()))
    assert fields.json().count(b"model") == 1


# The measures


def random_value(source: random.Random, depth: int) -> Any:
    kind = source.randrange(7 if depth else 5)
    if kind == 5:
        return [random_value(source, depth - 1) for _ in range(source.randrange(4))]
    if kind == 6:
        return {source.choice('a[{"\\,é'): random_value(source, depth - 1) for _ in range(source.randrange(4))}
    return source.choice([None, True, 5, -1.5, "", '[,{"', "\\", '\\"[', "é]}", "a, b" * 9])


def values_of(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values_of, inside))


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def test_the_measures_agree_with_a_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(5)
    for number in range(500):
        monkeypatch.setattr(structure, "WINDOW", source.choice([1, 3, 10, 10**6]))
        value = random_value(source, 6)
        raw = json.dumps(value, ensure_ascii=number % 2 == 0).encode()
        assert depth_of(value) <= structure.depth(raw) <= max(1, depth_of(value)), raw
        counted, exact = structure.count(raw, 10**9), values_of(value)
        assert exact <= counted <= 2 * exact + raw.count(b",") + raw.count(b"[") + raw.count(b"{"), raw
        if isinstance(value, list) and value:
            items, largest = structure.elements(raw)
            assert items == len(value) and largest >= max(map(values_of, value)) - 1


@pytest.mark.parametrize(
    "text", ["1" + "0" * 23, "-9223372036854775809", "1e400", "[1e19]", '{"a": 1e308}', "9" * 5000]
)
def test_a_number_that_is_too_large(text: str) -> None:
    assert structure.bad_number(text.encode()) is not None
    assert structure.bad_number(b'["' + text.encode().replace(b'"', b"") + b'"]') is None, "it is within a string"


def test_a_number_that_fits() -> None:
    for text in ("9223372036854775807", "-9223372036854775808", "1e18", "0.1234567890123456789", "5e-324"):
        assert structure.bad_number(text.encode()) is None


# Sizes


@pytest.mark.parametrize("name", BODIES)
def test_a_body_at_the_limit_is_answered(asker: Asker, name: str) -> None:
    """The bodies of tests/abuse one by one: none is an error of the server's."""
    path, make = BODIES[name]
    fields = make()
    model = "" if '"model"' in fields else '"model": "tiny", '
    response = sent(asker, ROUTES[path], f"{{{model}{fields}}}")
    assert response.status_code in (200, 400, 404), response.text
    assert len(response.content) < 100_000


def test_the_depth_of_every_field_is_bounded(asker: Asker) -> None:
    for route in SELECTING:
        for field in (*CONTENT[route.path], "metadata", "tools", "response_format", "chat_template_kwargs"):
            for opened, closed in (("[", "]"), ('{"a":', "}")):
                raw = f'"{field}": {opened * (MAX_DEPTH + 1)}1{closed * (MAX_DEPTH + 1)}'
                response = sent(asker, route, f'{{"model": "tiny", {raw}}}')
                if response.status_code == 400:
                    refused(response, route, 400, "invalid_request")
                assert response.status_code in (200, 400), "a field that the route does not know is not looked at"


SEQUENCES: list[tuple[dict[str, Any], str]] = [
    ({"n": 129}, "n"), ({"n": 16384}, "n"), ({"prompt": ["t3"] * 129}, "prompt"), ({"prompt": [[3]] * 129}, "prompt"),
    ({"prompt": ["t3"] * 12, "n": 12}, "n"), ({"n": 129, "use_beam_search": True}, "n"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param"), SEQUENCES)
def test_sequences_are_bounded(asker: Asker, changes: dict[str, Any], param: str) -> None:
    route = ROUTES["/v1/completions"]
    error = refused(asker.post(route, **changes), route, 400, "invalid_request")
    assert error["param"] == param and "max_sequences" in error["message"]


def test_as_many_sequences_as_there_may_be(asker: Asker) -> None:
    for changes in ({"n": 128}, {"prompt": ["t3"] * 128}, {"prompt": [[3]] * 64, "n": 2}):
        assert asker.post(ROUTES["/v1/completions"], **changes).status_code == 200
    assert asker.post(ROUTES["/v1/chat/completions"], n=129).status_code == 400


def test_vllm_is_told_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS"):
        monkeypatch.setenv(name, "5")
    limit_sequences(77)
    assert os.environ["VLLM_MAX_N_SEQUENCES"] == os.environ["VLLM_MAX_COMPLETION_PROMPTS"] == "77"


LISTS: list[tuple[str, Any]] = [
    ("stop", ["a"] * 17), ("stop", "a" * 1025), ("stop", [5]), ("bad_words", ["a"] * 129), ("bad_words", ["a" * 257]),
    ("logit_bias", {str(n): 1 for n in range(1025)}), ("logit_bias", {"5": "x"}), ("stop_token_ids", [5] * 1025),
    ("stop_token_ids", [-1]), ("allowed_token_ids", ["5"]), ("prompt", [3] * 385), ("prompt", [[3], "t3"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), LISTS, ids=lambda value: str(value)[:20])
def test_lists_are_bounded(asker: Asker, field: str, value: Any) -> None:
    route = ROUTES["/v1/completions"]
    code = "context_length_exceeded" if value == [3] * 385 else "invalid_request"
    error = refused(asker.post(route, **{field: value}), route, 400, code)
    assert error["param"].split(".")[0] == field and "expected" in error["message"]


def test_ids_to_detokenize_are_bounded(asker: Asker) -> None:
    route = ROUTES["/detokenize"]
    assert asker.post(route, tokens=[5] * 384).status_code == 200
    assert refused(asker.post(route, tokens=[5] * 385), route, 400, "context_length_exceeded")["param"] == "tokens"


# Types and encodings


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_the_type_of_a_body(asker: Asker, route: Route) -> None:
    body = json.dumps({"model": "tiny"} | CONTENT[route.path])
    for fine in ("", "application/json", "application/json; charset=UTF-8", "application/vnd.api+json"):
        assert sent(asker, route, body, **{"content-type": fine}).status_code == 200
    for wrong in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
    ):
        error = refused(sent(asker, route, body, **{"content-type": wrong}), route, 400, "invalid_request")
        assert "application/json" in error["message"]
    for charset in ("utf-16", "latin-1"):
        response = sent(asker, route, body, **{"content-type": f"application/json; charset={charset}"})
        assert charset in refused(response, route, 400, "invalid_request")["message"]


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate", "identity, gzip", "made-up"])
def test_a_compressed_body_is_refused_by_name(asker: Asker, route: Route, encoding: str) -> None:
    response = sent(asker, route, b"\x1f\x8b", **{"content-encoding": encoding})
    error = refused(response, route, 415, "unsupported_encoding")
    assert encoding.rpartition(" ")[2] in error["message"]
    body = json.dumps({"model": "tiny"} | CONTENT[route.path])
    assert sent(asker, route, body, **{"content-encoding": "identity"}).status_code == 200


# On the way in


def arriving(*chunks: bytes, then: Callable[[], None] = lambda: None) -> Any:
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False

    async def receive() -> Message:
        then()
        return messages.pop(0)

    return receive


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async def test() -> None:
        limits = BodyLimits()
        budget = BodyBudget(limits.budget)
        for length in (limits.body_bytes + 1, 10**15):
            with pytest.raises(RequestTooLargeError):
                await receive_body(arriving(b"x", then=pytest.fail), {"content-length": str(length)}, limits, budget)
        assert budget.free == limits.budget

    asyncio.run(test())


def test_bodies_wait_for_room_in_memory_and_give_it_back() -> None:
    async def test() -> None:
        limits = BodyLimits(max_bytes=200_000)
        budget = BodyBudget(450_000)
        size = 200_000
        received = [
            await receive_body(arriving(b"x" * size), {"content-length": str(size)}, limits, budget) for _ in range(2)
        ]
        reads: list[int] = []
        waiting = [
            asyncio.create_task(receive_body(
                arriving(b"x" * size, then=lambda: reads.append(1)), {"content-length": str(size)}, limits, budget
            ))
            for _ in range(3)
        ]  # fmt: skip
        small = await receive_body(arriving(b"{}"), {"content-length": "2"}, limits, budget)
        await asyncio.sleep(0)
        assert not reads and not small.is_large and not any(task.done() for task in waiting)
        waiting[0].cancel()
        await asyncio.sleep(0)
        received[0].release()
        received[0].release()
        await waiting[1]
        assert len(reads) == 1 and not waiting[2].done()
        received[1].release()
        (await waiting[2]).release()
        waiting[1].result().release()
        assert budget.free == 450_000

    asyncio.run(test())


def test_one_callers_bodies_leave_room_for_anothers() -> None:
    """They may stay for long: slow to arrive, or waiting for an adapter or a sequence of the engine."""

    async def test() -> None:
        budget = BodyBudget(800)
        held = [await budget.take(100, "flood") for _ in range(4)]
        waiting = [asyncio.create_task(budget.take(100, "flood")) for _ in range(5)]
        await asyncio.sleep(0)
        other = await asyncio.wait_for(budget.take(300, "other"), 1)
        assert budget.free == 100 and not any(task.done() for task in waiting)
        large = asyncio.create_task(budget.take(150, "third"))
        waiting.pop(0).cancel()
        await asyncio.sleep(0)
        held.pop()()
        await asyncio.sleep(0)
        assert waiting[0].done() and not large.done(), "first come, first served, as far as one has a share left"
        other()
        await asyncio.wait_for(large, 1)
        assert not any(task.done() for task in waiting[1:])
        for give_back in (*held, large.result(), waiting[0].result()):
            give_back()
        for task in waiting[1:]:
            (await asyncio.wait_for(task, 1))()
        assert budget.free == 800 and not budget._held

    asyncio.run(test())


def test_a_chunked_body_takes_what_it_may_become() -> None:
    async def test() -> None:
        limits = BodyLimits(max_bytes=200_000)
        budget = BodyBudget(450_000)
        body = await receive_body(arriving(b"x" * KEPT_BYTES, b"x", b"x"), {}, limits, budget)
        assert budget.free == 250_000
        body.release()
        with pytest.raises(RequestTooLargeError):
            await receive_body(arriving(*[b"x" * 50_000] * 5), {}, limits, budget)
        assert budget.free == 450_000

    asyncio.run(test())


def test_large_bodies_take_turns_and_half_of_the_time_is_left() -> None:
    async def test() -> None:
        loop, turns, worked = asyncio.get_running_loop(), Turns(), []

        async def work(number: int) -> None:
            if number % 2:
                async with turns.turn():
                    worked.append((loop.time(), number))
                    await asyncio.sleep(0.1)
            else:
                await turns.step()
                worked.append((loop.time(), number))

        leaver = asyncio.create_task(work(1))
        tasks = [asyncio.create_task(work(number)) for number in range(8)]
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(*tasks)
        assert {number for _, number in worked} == set(range(8))
        for (before, number), (after, _) in pairwise(worked[1:]):
            assert after - before >= (0.2 if number % 2 else 0.01) - 1e-9

    run_virtually(test())


def test_only_large_or_wide_bodies_take_turns() -> None:
    check = RequestBodies().check_of("/v1/chat/completions", True)
    assert not check.is_heavy(b'{"messages": [' + b'{"role": "user", "content": "x"},' * 100 + b"]}")
    assert check.is_heavy(b'{"messages": [' + b'{"role": "user", "content": "x"},' * 400 + b"]}")
    assert check.is_heavy(b'{"prompt": "' + b"," * KEPT_BYTES + b'"}')
    assert not check.is_heavy(b'{"prompt": "' + b"," * (KEPT_BYTES - 100) + b'"}')
