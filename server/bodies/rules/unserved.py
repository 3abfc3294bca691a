"""Owns what of OpenAI's and Anthropic's requests this server does not serve, and would otherwise drop in silence: tools
without a parser of their calls, tools that run elsewhere, answers that are no text, transfers between engines.

Invariant: a request whose answer would lack what it asks for is refused, with what to do instead.
"""

from typing import Any

import msgspec

from server.bodies.body_fields import BodyFields
from server.bodies.fields import RESPONSES, typed
from server.bodies.rules.messages import MISSING, wrong
from server.errors import InvalidRequestError

CHAT = "/v1/chat/completions"
TOOL_ROUTES = frozenset({CHAT, RESPONSES, "/v1/messages", "/v1/messages/count_tokens"})
"""Where vLLM needs a parser for tools."""
TRANSFERS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""Between the engines of a divided deployment, which this server is no part of; vLLM reads them as they come, also from
vllm_xargs."""
OWN_TOOLS = ("function", "custom", "namespace")
"""Kinds of tools of /v1/responses that the caller runs."""
NO_PARSER = (
    "found tools, expected none: this server was started without a tool-call parser; its operator starts it with "
    '--enable-auto-tool-choice --tool-call-parser NAME (or send tool_choice "none")'
)


def check_served(fields: BodyFields, path: str, takes_tools: bool) -> None:
    """Raises InvalidRequestError for what is not served. takes_tools: calls of tools can be read from an answer."""
    for name in TRANSFERS:
        if not fields.is_null(name):
            raise _unserved(name, "this server does not have this field; leave it out")
    if fields.kind("vllm_xargs") == "an object":
        for name in TRANSFERS:
            if name in typed(fields, "vllm_xargs", dict[str, msgspec.Raw]):
                raise _unserved(f"vllm_xargs.{name}", "this server does not have this field; leave it out")
    if path in TOOL_ROUTES and fields.kind("tools") == "an array":
        _check_tools(fields, path, takes_tools)
    if path != RESPONSES:
        _check_schema(fields)


def check_chat_options(fields: BodyFields) -> None:
    """Raises InvalidRequestError for options of OpenAI's chat that vLLM drops although the answer should show them."""
    if fields.raw("modalities").translate(None, b" \t\r\n") not in (b"null", b"[]", b'["text"]'):
        raise _unserved("modalities", 'this server answers with text alone; leave it out or ["text"]')
    if not fields.is_null("audio"):
        raise _unserved("audio", "this server answers with text alone; leave it out")
    if not fields.is_null("web_search_options"):
        raise _unserved("web_search_options", "this server does not search; leave it out")
    if fields.raw("store") not in (b"null", b"false"):
        raise _unserved("store", "responses are not stored by this server; leave it out or false")


def _check_tools(fields: BodyFields, path: str, takes_tools: bool) -> None:
    if path == RESPONSES:
        for number, tool in enumerate(typed(fields, "tools", list[msgspec.Raw])):
            kind = _field(tool, "type")
            if isinstance(kind, str) and kind not in OWN_TOOLS:
                error = wrong(f"tools.{number}.type", kind, '"function"')
                error.message += "; this server runs no tools itself"
                raise InvalidRequestError(error.message, param=error.param)
    choice = _choice(fields)
    if not takes_tools and choice != "none":
        param = "tools" if choice in (None, "auto") else "tool_choice"
        raise _unserved(param, NO_PARSER)


def _choice(fields: BodyFields) -> Any:
    """The choice among the tools, or its type if it is an object."""
    raw = fields.raw("tool_choice")
    return _field(msgspec.Raw(raw), "type") if raw[:1] == b"{" else msgspec.json.decode(raw)


def _check_schema(fields: BodyFields) -> None:
    """A response format of a schema has both, a name and the schema; the model would speak of other formats."""
    wanted = fields.raw("response_format")
    if wanted[:1] != b"{" or _field(msgspec.Raw(wanted), "type") != "json_schema":
        return
    schema = _field(msgspec.Raw(wanted), "json_schema")
    if isinstance(schema, dict):
        place = "response_format.json_schema"
        if not isinstance(name := schema.get("name", MISSING), str):
            raise wrong(f"{place}.name", name, "a string")
        if not isinstance(found := schema.get("schema", MISSING), dict):
            raise wrong(f"{place}.schema", found, "an object")


def _field(raw: msgspec.Raw, name: str) -> Any:
    """A field of an object; None if it is absent, or the value is no object."""
    value = bytes(raw)
    if value[:1] != b"{":
        return None
    found = msgspec.json.decode(value, type=dict[str, msgspec.Raw]).get(name)
    return None if found is None else msgspec.json.decode(found)


def _unserved(name: str, advice: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {advice}", param=name)
