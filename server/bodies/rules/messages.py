"""Owns the check of one message of a conversation, by its role: what the models let pass or say in the names of their
branches, and vLLM's handlers cannot read.

Invariant: what is refused here names the caller's field and what is expected of it; the models check the rest.
"""

import json
from collections.abc import Mapping
from typing import Any

from adapters.format.strict_json import json_kind
from server.errors import InvalidRequestError

MISSING: Any = object()
"""A field that is not there."""
_ASK = ("system", "developer", "user")
_OTHER_PARTS = frozenset({"image_url", "input_audio", "file", "video_url", "audio_url"})
"""Parts that are no text; each has an object under its own name."""


def check_chat_message(place: str, message: Mapping[str, Any]) -> None:
    """Check a message of a chat. Raises InvalidRequestError."""
    role = message.get("role", MISSING)
    if role in ("system", "developer", "user", "tool"):
        check_content_of(place, message)
    if role == "tool":
        _expect(f"{place}.tool_call_id", message.get("tool_call_id", MISSING), str)
    if role == "user" and isinstance(content := message.get("content"), list):
        for number, part in enumerate(content):
            _check_user_part(f"{place}.content.{number}", part)
    if isinstance(calls := message.get("tool_calls"), list):
        for number, call in enumerate(calls):
            if isinstance(call, dict) and call.get("type", "function") == "function":
                _check_call(f"{place}.tool_calls.{number}", call)


def check_anthropic_message(place: str, message: Mapping[str, Any]) -> None:
    """Check a message of /v1/messages. Raises InvalidRequestError."""
    check_content_of(place, message)


def check_input_item(place: str, item: Mapping[str, Any]) -> None:
    """Check an input item of /v1/responses. Raises InvalidRequestError."""
    role, content = item.get("role"), item.get("content")
    if role not in _ASK or not isinstance(content, list):
        return
    for number, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text":
            raise wrong(f"{place}.content.{number}.type", "text", '"input_text"')


def check_text(place: str, part: Any) -> None:
    """Check a part of a content: one of text has a text. Raises InvalidRequestError."""
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"):
        _expect(f"{place}.text", part.get("text", MISSING), str)


def check_content_of(place: str, message: Mapping[str, Any]) -> None:
    """Check that a message has a content. Raises InvalidRequestError."""
    if message.get("content") is None:
        raise wrong(f"{place}.content", message.get("content", MISSING), "a string or an array")


def _check_user_part(place: str, part: Any) -> None:
    if not isinstance(part, dict):
        raise wrong(place, part, "an object")
    kind = part.get("type", MISSING)
    if kind != "text" and (not isinstance(kind, str) or kind not in _OTHER_PARTS):
        raise wrong(f"{place}.type", kind, '"text"')
    if kind in _OTHER_PARTS:
        _expect(f"{place}.{kind}", part.get(kind, MISSING), dict)


def _check_call(place: str, call: Mapping[str, Any]) -> None:
    function = call.get("function", MISSING)
    _expect(f"{place}.function", function, dict)
    for name in ("name", "arguments"):
        _expect(f"{place}.function.{name}", function.get(name, MISSING), str)


def _expect(place: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise wrong(place, value, "a string" if kind is str else "an object")


def wrong(place: str, value: Any, expected: str) -> InvalidRequestError:
    """The error for a value that is not what is expected at its place."""
    found = "missing" if value is MISSING else f"found {_shown(value)}"
    return InvalidRequestError(f"{place}: {found}, expected {expected}", param=place)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return json_kind(value)
    text = json.dumps(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
