"""Owns how the errors of vLLM's handlers become ours: a string code, a field of the caller's, a message for people.

vLLM has no codes, only statuses, so its errors are recognized by their words (a test holds them to what vLLM raises).
Invariant: of an error that is not the caller's, nothing of vLLM's words is shown.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from server.api.error_responses import ApiError, as_api_error, bounded, internal_error
from server.api.translation.fields import in_words_of_json
from server.errors import EngineUnavailableError, ModelNotFoundError

CONTENT_FIELDS = ("messages", "prompt", "input", "tokens")
"""Where a request has its text, which vLLM calls by names of its own."""

SPEC_FIELDS = ("structured_outputs", "response_format", "text", "output_config", "output_format", "tools")
"""Where a request has a structured-output spec."""
LENGTH_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""vLLM has a name of its own for what some routes call by another."""
RANKED = "top_logprobs"
"""What /v1/completions, and vLLM inside, call logprobs."""
_LENGTH_FIELD = re.compile(rf"\b(?:{'|'.join(LENGTH_FIELDS)})\b")
UNSAID = "the request is not valid"
"""Where vLLM's words are about its settings alone."""
_NO_ROOM = re.compile(r"_tokens must be at least 1, got 0\b")
_OF_CONTENT = re.compile(r"Token id \d+ is out of vocabulary|The \w+ prompt cannot be empty")
_ENGINE_DEAD = "EngineCore encountered an issue"
_TOO_LONG = re.compile(r"maximum (?:context|model) length|exceeds the max_model_len|context length is only")
_NO_MODEL = re.compile(r"The model `(.*)` does not exist", re.DOTALL)
_VALIDATION_ERROR_SUFFIX = re.compile(r" \((?:parameter=[\w.\[\]]+)?(?:, )?(?:value=.*)?\)\Z", re.DOTALL)
_PYDANTIC_TITLE = re.compile(r"\A\d+ validation errors? for \S+\n")
_PYDANTIC_ERROR = re.compile(r"^(\S.*)\n  (.*?) \[type=", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_OURS_TO_SET = re.compile(r"\bVLLM_[A-Z]|(?<!\w)--[a-z]")
_QUOTED_WORD = re.compile(r"\A([a-z]\w*)\b|[`'\"]([a-z]\w*)[`'\"]")
_FIELD = re.compile(r"[\w.\[\]$-]{1,100}")
_Change = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
_INTERNALS: tuple[_Change, ...] = (
    (re.compile(r" at 0x[0-9a-fA-F]+"), ""),
    (re.compile(r"(?<![\w.:/#<])/(?!v1/)(?:[\w.-]+/)+[\w.-]+"), "<path>"),
    (re.compile(r"[:,]? ?\{'[^{}]*\}"), ""),
    (re.compile(r"\s+"), " "),
)


def translated(status: int, body: Any, fields: Mapping[str, bytes], request_id: str | None) -> ApiError:
    """Our error for vLLM's response, or event of a stream, with `body`; one that is ours already stays as it is.

    fields: the request's, as the JSON text of each (b"" for a long one). status: of the response, where the error has
    none.
    """
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        error = {"message": body.get("detail") if isinstance(body, Mapping) else None}
    code, message, param = error.get("code"), error.get("message"), error.get("param")
    message = message if isinstance(message, str) else ""
    param = param if isinstance(param, str) else None
    if isinstance(code, str):
        return ApiError(status, code, message, param, error.get("violations"))
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    if status < 400 or (status >= 500 and status != 501):
        return _of_the_server(status, message, request_id)
    if status == 404:
        if named := _NO_MODEL.search(message):
            return as_api_error(ModelNotFoundError(named[1]))
        return ApiError(404, "not_found", clean(message), field_of(param, message, fields))
    return refused(message, param, fields)


def refused(message: str, param: str | None, fields: Mapping[str, bytes]) -> ApiError:
    """Our error for a request that vLLM refuses, in its words. param: vLLM's name for what is wrong."""
    content = content_field(fields)
    length = next((field for field in LENGTH_FIELDS if field in fields), None)
    if length is not None:
        message = _LENGTH_FIELD.sub(length, message)
        param = length if param in LENGTH_FIELDS else param
    if param == "logprobs" and fields.get(RANKED, b"null") != b"null":
        param = RANKED
    if _NO_ROOM.search(message) and (length is None or fields[length] != b"0"):
        return ApiError(400, "context_length_exceeded", "the prompt leaves no room for a token of the answer", content)
    if _TOO_LONG.search(message):
        return ApiError(400, "context_length_exceeded", clean(message), param if param in fields else content)
    if _OF_CONTENT.match(message):
        return ApiError(400, "invalid_request", clean(message), content)
    field, text = field_of(param, message, fields), clean(message)
    if text == UNSAID and field is not None:
        text = f"{field}: this server, as it was started, does not serve a request with this"
    return ApiError(400, "invalid_request", text, field)


def content_field(fields: Mapping[str, bytes]) -> str | None:
    """The field that a request has its text in."""
    return next((field for field in CONTENT_FIELDS if field in fields), None)


def spec_field(fields: Mapping[str, bytes]) -> str | None:
    """The field that a request has its structured-output spec in."""
    return next((field for field in SPEC_FIELDS if field in fields), None)


def refusal_of(error: Exception, fields: Mapping[str, bytes]) -> ApiError:
    """Our error for an exception by which vLLM refuses a request."""
    parameter = getattr(error, "parameter", None)
    return refused(str(error), parameter if isinstance(parameter, str) else None, fields)


def says_engine_is_dead(message: str) -> bool:
    """Whether a message of vLLM's says that the engine is gone."""
    return _ENGINE_DEAD in message


def clean(message: str) -> str:
    """A message of vLLM's for the caller: without repeated values, Python's words, settings of the server and its
    paths; in one line, of bounded length."""
    message = message[:20_000]
    if _PYDANTIC_TITLE.match(message):
        message = "; ".join(f"{where}: {problem}" for where, problem in _PYDANTIC_ERROR.findall(message))
    message = _VALIDATION_ERROR_SUFFIX.sub("", message)
    for pattern, instead in _INTERNALS:
        message = pattern.sub(instead, message)
    sentences = _SENTENCE_END.split(in_words_of_json(message).strip())
    kept = " ".join(sentence for sentence in sentences if not _OURS_TO_SET.search(sentence))
    return bounded(kept or UNSAID)


def field_of(param: str | None, message: str, fields: Mapping[str, bytes]) -> str | None:
    """The caller's field: the one that vLLM names (some by names of its own), if it was given or the message says so
    too, else one that the message quotes."""
    if param is not None:
        param = param.removeprefix("body.")
        if param.split(".")[0] in fields or (
            _FIELD.fullmatch(param) and re.search(rf"\b{re.escape(param)}\b", message)
        ):
            return param
    quoted = (first or second for first, second in _QUOTED_WORD.findall(message[:2000]))
    return next((word for word in quoted if word in fields), None)


def parsed(body: bytes) -> Any:
    """The JSON of an error's body; None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _of_the_server(status: int, message: str, request_id: str | None) -> ApiError:
    if says_engine_is_dead(message):
        return engine_unavailable("the engine has ended")
    if status == 503:
        return engine_unavailable("the engine cannot take the request now; retry in a few seconds")
    return internal_error(request_id)


def engine_unavailable(message: str) -> ApiError:
    """503, with when to retry."""
    return as_api_error(EngineUnavailableError(message, retry_after_s=5))
