"""vLLM's and pydantic's errors in our shape: by code, field and message; and errors below ASGI."""

import logging
import re
from pathlib import Path
from typing import Any

import httptools
import pytest
import vllm.entrypoints
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.tokenize.protocol import TokenizeRequest
from vllm.exceptions import (
    QueueOverflowError,
    RetryableRequestError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.api.error_responses import ApiError, as_api_error
from server.api.route_table import dialect_of
from server.api.translation.vllm_errors import clean, field_of, translated
from server.app.serving_log import ServingLogFilter
from server.errors import (
    AdapterOutputInvalidError,
    AuditLogError,
    ContextLengthError,
    EngineUnavailableError,
    InvalidRequestError,
    NameConflictError,
    QuotaExceededError,
    RateLimitedError,
)

ENTRYPOINTS = Path(vllm.entrypoints.__file__).parent
USER = [{"role": "user", "content": "x"}]


def told(error: Exception, **fields: bytes) -> ApiError:
    """Our error for vLLM's response to an exception."""
    response = create_error_response(error)
    return translated(response.error.code, response.model_dump(), fields, "r1")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("n is wrong"), 400, "invalid_request"),
        (TypeError("n is wrong"), 400, "invalid_request"),
        (OverflowError("n is wrong"), 400, "invalid_request"),
        (NotImplementedError("n is not there"), 400, "invalid_request"),
        (VLLMValidationError("n is wrong", parameter="n", value=3), 400, "invalid_request"),
        (VLLMUnprocessableEntityError("n is wrong", parameter="n"), 400, "invalid_request"),
        (VLLMNotFoundError("there is none"), 404, "not_found"),
        (EngineDeadError(), 503, "engine_unavailable"),
        (QueueOverflowError(), 503, "engine_unavailable"),
        (RetryableRequestError(), 503, "engine_unavailable"),
        (EngineGenerateError("secret"), 500, "internal_error"),
        (RuntimeError("secret"), 500, "internal_error"),
        (KeyError("secret"), 500, "internal_error"),
    ],
    ids=repr,
)
def test_an_exception_of_vllms_by_its_code(error: Exception, status: int, code: str) -> None:
    found = told(error, n=b"3")
    assert (found.status, found.code) == (status, code)
    assert (found.param == "n") == (code == "invalid_request")
    assert "secret" not in found.message and ("r1" in found.message) == (code == "internal_error")
    assert (found.retry_after_s is not None) == (status == 503)


def test_vllms_words_for_a_model_that_is_not_there() -> None:
    source = (ENTRYPOINTS / "serve" / "engine" / "serving.py").read_text()
    assert 'f"The model `{request.model}` does not exist. "' in source
    body = {"error": {"message": "The model `x` does not exist. Valid aliases: base.", "code": 404, "param": "model"}}
    found = translated(404, body, {}, None)
    assert (found.code, found.param) == ("model_not_found", "model") and "base" not in found.message.split("GET")[0]


def test_vllms_words_for_a_text_that_is_too_long() -> None:
    """Wherever vLLM has such words, they are ours to know."""
    found = set()
    root = ENTRYPOINTS.parent
    for file in (
        "renderers/params.py", "v1/engine/input_processor.py", "entrypoints/serve/utils/api_utils.py",
        "entrypoints/openai/responses/serving.py",
    ):  # fmt: skip
        text = re.sub(r'"\s*\n\s*f?"', "", (root / file).read_text())
        found |= {
            match[0] for match in re.finditer(r'f"[^"]*(?:context length|model length|max_model_len \{)[^"]*"', text)
        }
    assert len(found) >= 5
    for words in found:
        message = re.sub(r"\{[^}]*\}", "5", words[2:-1])
        error = told(VLLMValidationError(message, parameter="input_tokens", value=3), prompt=b"")
        assert (error.code, error.param) == ("context_length_exceeded", "prompt"), words


def test_a_prompt_that_leaves_no_room() -> None:
    error = VLLMValidationError("max_tokens must be at least 1, got 0.", parameter="max_tokens", value=0)
    assert told(error, messages=b"").code == "context_length_exceeded"
    assert told(error, messages=b"", max_tokens=b"9").param == "messages"
    asked = told(error, messages=b"", max_tokens=b"0")
    assert (asked.code, asked.param) == ("invalid_request", "max_tokens")
    negative = VLLMValidationError("max_tokens must be at least 1, got -3.", parameter="max_tokens", value=-3)
    named = told(negative, input=b"", max_output_tokens=b"-3")
    assert named.param == "max_output_tokens" and named.message == "max_output_tokens must be at least 1, got -3."


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("n is wrong (parameter=n, value=[1, 2, (3)])", "n is wrong"),
        ("n is wrong (parameter=n)", "n is wrong"),
        ("n is wrong (and so on)", "n is wrong (and so on)"),
        ("too many. Set VLLM_MAX to more. Or less.", "too many. Or less."),
        ("not there. Start with --enable-x.", "not there."),
        ("<class 'vllm.x.Thing'> broke at <Thing object at 0x7f00>", "Thing broke at <Thing object>"),
        ("found None in /root/models/tiny/config.json, see /v1/models", "found null in <path>, see /v1/models"),
        ("none are given: {'json': None, 'regex': None}", "none are given"),
        (
            "2 validation errors for Chat\ntool_choice\n  Value error, no such tool [type=value_error, "
            "input_value={'a': 1}, input_type=dict]\n    For further information visit https://errors.pydantic.dev/2/v/"
            "value_error\nn\n  Field required [type=missing, input_value={}, input_type=dict]\n    For further ...",
            "tool_choice: Value error, no such tool; n: Field required",
        ),
        ("a\n  b\t c", "a b c"),
        ("", "the request is not valid"),
    ],
)  # fmt: skip
def test_a_message_for_people(message: str, cleaned: str) -> None:
    assert clean(message) == cleaned


def test_a_message_is_bounded() -> None:
    assert len(clean("x" * 10**6)) <= 1000 and len(clean("{'" + "x, " * 10**5 + "}")) <= 1000


@pytest.mark.parametrize(
    ("param", "message", "field"),
    [
        ("temperature", "it is wrong", "temperature"),
        ("body.temperature", "it is wrong", "temperature"),
        ("prompt", "prompt must be given", "prompt"),
        ("response_id", "Response with id 'x' not found", None),
        (None, "`temperature` is wrong", "temperature"),
        (None, "temperature is wrong", "temperature"),
        (None, "the 'x' is wrong", None),
        ("x y", "x y is wrong", None),
    ],
)
def test_the_field_of_an_error(param: str | None, message: str, field: str | None) -> None:
    assert field_of(param, message, {"temperature": b"1"}) == field


@pytest.mark.parametrize(
    "body", [None, [], "x", {"detail": "Not here"}, {"error": "Unauthorized"}, {"error": {"code": True}}]
)
def test_a_body_in_no_shape_at_all(body: Any) -> None:
    for status, code in (
        (400, "invalid_request"),
        (404, "not_found"),
        (500, "internal_error"),
        (200, "internal_error"),
    ):
        error = translated(status, body, {}, "r1")
        assert error.code == code and error.message and error.status == (500 if status == 200 else status)


def test_an_error_of_ours_stays_as_it_is() -> None:
    ours = ApiError(409, "name_conflict", "x", "name", ["a", "b"])
    assert translated(409, ours.body(), {}, None).body() == ours.body()


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (ChatCompletionRequest, {"messages": USER, "temperature": "hot"}, "temperature",
         'temperature: found "hot", expected a number, unable to parse string as a number'),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content",
         "messages.0.content: found 5, expected a string or an array"),
        (ChatCompletionRequest, {"messages": [{"content": "x"}]}, "messages.0.role", "messages.0.role: missing"),
        (ChatCompletionRequest, {"messages": USER, "stop": ["a", 5]}, "stop.1", "stop.1: found 5, expected a string"),
        (ChatCompletionRequest, {}, "messages", "messages: missing"),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": None}]}, "messages.0.content",
         "messages.0.content: found null, expected a string or an array"),
        (CompletionRequest, {"prompt": {"a": 1}}, "prompt", "prompt: found an object, expected an array or a string"),
        (ResponsesRequest, {"input": 5}, "input", "input: found 5, expected a string or an array"),
        (ResponsesRequest, {"input": [{"role": "user", "content": 5}]}, "input.0.content",
         "input.0.content: found 5, expected a string or an array"),
        (ResponsesRequest, {"input": "x", "tools": [{"type": "function"}]}, "tools.0.name", "tools.0.name: missing"),
        (AnthropicMessagesRequest, {"model": "m", "messages": USER}, "max_tokens", "max_tokens: missing"),
        (AnthropicMessagesRequest, {"model": "m", "messages": USER, "max_tokens": -1}, "max_tokens",
         "max_tokens: max_tokens must be positive"),
        (TokenizeRequest, {"messages": [{"role": 5}]}, "messages.0.role",
         "messages.0.role: found 5, expected a string; prompt: missing"),
        (ChatCompletionRequest, {"messages": USER, "stop": ["a"] * 9}, "stop",
         "stop: found an array; the array should have at most 4 items after validation, not 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_pydantics_errors_by_the_callers_field(kind: Any, body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as failed:
        TypeAdapter(kind).validate_python(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in failed.value.errors()]
    found = as_api_error(RequestValidationError(errors, body=body))
    assert (found.status, found.code, found.param) == (400, "invalid_request", param)
    assert found.message == message


def test_an_error_where_a_retry_is_useless_says_so() -> None:
    """OpenAI's clients retry every 409, 429 and 5xx unless it has this header."""
    for error, header in (
        (AdapterOutputInvalidError("x"), "false"),
        (QuotaExceededError("x"), "false"),
        (NameConflictError("x"), "false"),
        (AuditLogError("x"), "false"),
        (RateLimitedError("x", retry_after_s=3), None),
        (EngineUnavailableError("x"), None),
        (InvalidRequestError("x"), None),
    ):
        shown = as_api_error(error).response()
        assert shown.headers.get("x-should-retry") == header, error
        assert header is None or "retry-after" not in shown.headers


def test_a_message_about_the_length_has_the_code_too() -> None:
    """Some clients look for it there."""
    for error in (as_api_error(ContextLengthError("too long")), ApiError(400, "context_length_exceeded", "too long")):
        assert error.message == "too long (context_length_exceeded)" == error.body()["error"]["message"]


def test_an_error_of_words_alone() -> None:
    """As vLLM raises it for a body of another type."""
    found = as_api_error(RequestValidationError(["Unsupported Media Type: Only 'application/json' is allowed"]))
    assert (found.status, found.code, found.param) == (400, "invalid_request", None) and "Media Type" in found.message
    assert as_api_error(RequestValidationError([])).message


def test_many_errors_are_told_in_a_bounded_message() -> None:
    body = {"messages": USER, "logit_bias": dict.fromkeys(map(str, range(5000)), "x")}
    with pytest.raises(ValidationError) as failed:
        TypeAdapter(ChatCompletionRequest).validate_python(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in failed.value.errors()]
    found = as_api_error(RequestValidationError(errors, body=body))
    assert found.param == "logit_bias.0" and len(found.message) <= 1000


@pytest.mark.parametrize(
    ("path", "dialect"),
    [("/v1/messages", "anthropic"), ("/v1/messages/count_tokens", "anthropic"), ("/v1/messages/batches", "anthropic"),
     ("/v1/messages/", "anthropic"), ("/v1/messagesx", "openai"), ("/v1/responses", "responses"), ("/", "openai"),
     ("", "openai"), ("/x" * 20_000, "openai"), ("/root/v1/messages/x", "anthropic")],
)  # fmt: skip
def test_the_dialect_of_a_path(path: str, dialect: str) -> None:
    root_path = "/root" if path.startswith("/root") else ""
    assert dialect_of({"type": "http", "path": path, "root_path": root_path}) == dialect


def test_a_response_below_asgi_is_whole_http() -> None:
    found: dict[str, Any] = {"headers": {}, "body": b""}

    class Reader:
        def on_header(self, name: bytes, value: bytes) -> None:
            found["headers"][name.lower()] = value

        def on_body(self, body: bytes) -> None:
            found["body"] += body

        def on_message_complete(self) -> None:
            found["is_complete"] = True

    parser = httptools.HttpResponseParser(Reader())
    parser.feed_data(ApiError(431, "headers_too_large", "found \u00e9", retry_after_s=3).http11("r1"))
    assert parser.get_status_code() == 431 and found["is_complete"] and not parser.should_keep_alive()
    assert found["headers"][b"x-request-id"] == b"r1" and found["headers"][b"retry-after"] == b"3"
    assert b'"headers_too_large"' in found["body"] and "found \u00e9".encode() in found["body"]


def test_the_log_filter_leaves_what_is_no_requests_alone() -> None:
    record = logging.LogRecord(
        "vllm.x", logging.ERROR, "x.py", 1, "broke", (), (ValueError, ValueError("x"), None), "f"
    )
    assert ServingLogFilter().filter(record) and record.msg == "broke"
