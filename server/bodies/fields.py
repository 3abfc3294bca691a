"""Owns the rules of single fields: what is refused because it would be ignored, what lists and texts may hold, and how
many sequences a request asks for.

Invariant: a field that a known client expects to change the answer is either obeyed or refused; of other unknown fields
vLLM sees nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from server.bodies.body_fields import BodyFields
from server.bodies.limits import BodyLimits
from server.errors import ContextLengthError, InvalidRequestError

RESPONSES = "/v1/responses"
_REQUEST_ID = re.compile(rb'"[A-Za-z0-9._-]{1,64}"')
CONSTRAINTS = ("grammar", "ebnf", "regex", "json_schema", "structural_tag", "response_format", "structured_outputs")
"""Fields, of this and other servers, that constrain the output; one that a route does not know is refused."""
ADAPTER_SELECTORS = (
    "adapter",
    "adapter_id",
    "adapter_name",
    "adapters",
    "lora",
    "lora_id",
    "lora_path",
    "lora_request",
)
NEVER_IGNORED = frozenset({*CONSTRAINTS, *ADAPTER_SELECTORS, "best_of", "functions", "function_call"})
TOKENIZER_ARGUMENTS = frozenset(
    {
        *("self", "model_config", "tokenizer", "conversation", "tools", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
_USE_CONSTRAINT = "use `structured_outputs` or `response_format`"
_ROUTE_CONSTRAINTS = {RESPONSES: "use `structured_outputs` or `text.format`", "/v1/messages": "use `output_config`"}

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class ListRule:
    """What a field holds if it is not null: `type`, with at most `most` elements of `characters` characters."""

    type: Any
    most: int
    characters: int | None = None


_RULES: Mapping[str, ListRule] = {
    "stop": ListRule(str | list[str], 4, 1024),
    "stop_sequences": ListRule(list[str], 4, 1024),
    "bad_words": ListRule(list[str], 128, 256),
    "logit_bias": ListRule(dict[str, float], 1024, 20),
    "stop_token_ids": ListRule(list[TokenId], 1024),
    "allowed_token_ids": ListRule(list[TokenId], 2**20),
    "logprob_token_ids": ListRule(list[TokenId], 1024),
    "prompt_embeds": ListRule(str | list[str], 16384),
}
"""vLLM's own limits may be lower. allowed_token_ids: a whole vocabulary at most."""
TYPED_FIELDS = frozenset({"prompt", "tokens", *_RULES})
"""Fields whose elements are checked here one by one."""


def check_ignored(fields: BodyFields, path: str, known: frozenset[str]) -> None:
    """Raises InvalidRequestError for a field that would be ignored although the client counts on it.

    known: the fields of the route's request model.
    """
    for name in [name for name in fields.names if name in NEVER_IGNORED or name.startswith("guided_")]:
        if name in known or fields.is_null(name):
            continue
        if name.startswith("guided_") or name in CONSTRAINTS:
            raise _ignored(name, _ROUTE_CONSTRAINTS.get(path, _USE_CONSTRAINT) + ", which constrain the output")
        if fields.raw(name) in (b"[]", b"{}", b"false", b'""'):
            continue
        if name in ADAPTER_SELECTORS:
            raise _ignored(name, "name the adapter as `model`")
        if name == "best_of" and fields.raw(name) != b"1" and fields.raw(name) != fields.raw("n"):
            raise _ignored(name, "ask for `n` sequences and choose among them")
        if name == "functions" or (name == "function_call" and fields.raw(name) not in (b'"none"', b'"auto"')):
            raise _ignored(name, "use `tools` and `tool_choice`")
    if path == RESPONSES:
        _check_responses(fields)


def _ignored(name: str, advice: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: this server does not have this field; {advice}", param=name)


def _check_responses(fields: BodyFields) -> None:
    """Nothing is stored: a response cannot be found again, continued or run in the background."""
    for name, advice in (
        ("store", "leave it out or false"),
        ("background", "leave it out or false, and stream the response if it is long"),
        ("previous_response_id", "send the whole conversation as `input`"),
        ("conversation", "send the whole conversation as `input`"),
    ):
        if fields.raw(name) not in (b"null", b"false"):
            raise InvalidRequestError(f"{name}: responses are not stored by this server; {advice}", param=name)
    fields.drop(("background", "previous_response_id", "conversation"))
    fields.set("store", False)


def drop_empty_tools(fields: BodyFields) -> None:
    """`tools: []` is no tools, and a choice among them that chooses none is no choice. Raises InvalidRequestError for
    a choice that needs a tool."""
    if _compact(fields, "tools") in (b"[]", b"null"):
        fields.drop(("tools",))
        if _compact(fields, "tool_choice") in (b"null", b'"auto"', b'"none"', b'{"type":"auto"}', b'{"type":"none"}'):
            fields.drop(("tool_choice",))
        elif fields.kind("tool_choice") in ("a string", "an object"):
            raise InvalidRequestError(
                "tool_choice: found a choice that needs a tool, but no `tools`", param="tool_choice"
            )


def _compact(fields: BodyFields, name: str) -> bytes:
    """A field's JSON text without the space between values; for fields whose strings have none."""
    return fields.raw(name).translate(None, b" \t\r\n")


def check_not_empty(fields: BodyFields) -> None:
    """Raises InvalidRequestError for a conversation without messages. A null beside the other form of a body goes."""
    for name, other in (("messages", "prompt"), ("prompt", "messages")):
        if fields.is_null(name) and not fields.is_null(other):
            fields.drop((name,))
    for name, kinds in (("messages", ("an array",)), ("input", ("a string", "an array"))):
        if name in fields and fields.kind(name) not in kinds:
            message = f"{name}: found {fields.kind(name)}, expected {' or '.join(kinds)}"
            raise InvalidRequestError(message, param=name)
        if _compact(fields, name) == b"[]":
            raise InvalidRequestError(f"{name}: found an empty array, expected at least one message", param=name)


def check_template_arguments(fields: BodyFields) -> None:
    """Raises InvalidRequestError for arguments of the tokenizer's among those of the chat template: with `tokenize`,
    `padding` and `max_length` a text of any length could be made of a short one."""
    if fields.kind("chat_template_kwargs") != "an object":
        return
    if found := TOKENIZER_ARGUMENTS & typed(fields, "chat_template_kwargs", dict[str, msgspec.Raw]).keys():
        name = f"chat_template_kwargs.{min(found)}"
        raise InvalidRequestError(f"{name}: found an argument of the tokenizer, which the server sets", param=name)


def check_request_id(fields: BodyFields) -> None:
    """Raises InvalidRequestError for an ID that cannot stand in a line of the log: vLLM makes it the response's and
    the engine's."""
    if not fields.is_null("request_id") and not _REQUEST_ID.fullmatch(fields.raw("request_id")):
        expected = "expected 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        raise InvalidRequestError(f"request_id: found another value; {expected}", param="request_id")


def check_lists(fields: BodyFields, limits: BodyLimits) -> None:
    """Raises InvalidRequestError for lists and texts of another type or size than the rules have."""
    for name, rule in _RULES.items():
        if not fields.is_null(name):
            value = typed(fields, name, rule.type)
            _check_size(name, [value] if isinstance(value, str) else value, rule)
    if not fields.is_null("tokens"):
        _check_ids("tokens", typed(fields, "tokens", list[TokenId]), limits)


def _check_size(name: str, value: Any, rule: ListRule) -> None:
    if len(value) > rule.most:
        raise InvalidRequestError(f"{name}: found {len(value)} elements, expected at most {rule.most}", param=name)
    longest = 0 if rule.characters is None else max(map(len, value), default=0)
    if rule.characters is not None and longest > rule.characters:
        raise InvalidRequestError(
            f"{name}: found an element of {longest} characters, expected at most {rule.characters}", param=name
        )


def _check_ids(name: str, ids: list[int], limits: BodyLimits) -> None:
    if len(ids) > limits.max_model_len:
        raise ContextLengthError(
            f"{name}: found {len(ids)} token ids, expected at most {limits.max_model_len}, the model's length",
            param=name,
        )


def count_sequences(fields: BodyFields, limits: BodyLimits) -> int:
    """The sequences that the request asks for. Raises InvalidRequestError if there are too many of them."""
    n = 1
    if not fields.is_null("n"):
        n = typed(fields, "n", int)
    prompts = max(_count_prompts(fields, limits), _count_embeds(fields))
    if n * prompts > limits.max_sequences:
        shown = f"{n} x {prompts} prompts" if prompts > 1 else str(n)
        raise InvalidRequestError(
            f"{'n' if n > 1 else 'prompt'}: found {shown} sequences, expected at most {limits.max_sequences} of one "
            "request (the setting max_sequences)",
            param="n" if n > 1 else "prompt",
        )
    return max(n, 1) * prompts


def _count_embeds(fields: BodyFields) -> int:
    return len(fields.value("prompt_embeds")) if fields.raw("prompt_embeds")[:1] == b"[" else 1


def _count_prompts(fields: BodyFields, limits: BodyLimits) -> int:
    """The prompts of a completion: a text or token ids, or a list of one of them."""
    raw = fields.raw("prompt")
    if raw[:1] != b"[":
        return 1
    first = raw[1:].lstrip()[:1]
    if first not in (b"[", b'"'):
        _check_prompt_ids(fields, [typed(fields, "prompt", list[TokenId])], limits)
        return 1
    if first == b'"':
        return len(typed(fields, "prompt", list[str]))
    if (found := raw.count(b"[") - 1) > limits.max_sequences:
        return found  # too many, and not worth a parser's time
    prompts: list[list[int]] = typed(fields, "prompt", list[list[TokenId]])
    if len(prompts) <= limits.max_sequences:
        _check_prompt_ids(fields, prompts, limits)
    return len(prompts)


def _check_prompt_ids(fields: BodyFields, prompts: list[list[int]], limits: BodyLimits) -> None:
    if (total := sum(map(len, prompts))) > limits.token_ids:
        raise InvalidRequestError(
            f"prompt: found {total} token ids, expected at most {limits.token_ids} in one request", param="prompt"
        )
    if fields.is_null("truncate_prompt_tokens"):
        for ids in prompts:
            _check_ids("prompt", ids, limits)


_JSON_TYPES = {"str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", " | ": " or "}
_PYTHON_TYPE = re.compile(r"\b(?:str|int|float|bool)\b| \| ")


def typed(fields: BodyFields, name: str, expected: Any) -> Any:
    """A field's value. Raises InvalidRequestError unless it has that type."""
    try:
        return msgspec.json.decode(fields.raw(name), type=expected)
    except msgspec.ValidationError as error:
        reason = _PYTHON_TYPE.sub(lambda word: _JSON_TYPES[word[0]], str(error)).replace("`", "")
        where, _, place = reason.partition(" - at $")
        found = f"{where[:1].lower()}{where[1:]}" + (f" at {name}{place}" if place else "")
        raise InvalidRequestError(f"{name}: {found}"[:300], param=name) from None
