"""Owns what is known of a route's request model (pydantic's): its fields, and the check of long lists by element.

Pydantic lists what every branch of a union has against every element: 1.9 ms for each wrong input item of
/v1/responses. So a long list is validated here first, a few elements at a time, up to the first wrong one. Invariant:
what is refused here would have been refused by the model.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError

from server.bodies.rules.messages import check_anthropic_message, check_chat_message, check_input_item, check_text
from server.errors import InvalidRequestError

CHUNK = 8
"""Elements validated in one go, without a pause for others."""
MESSAGES = frozenset({"messages", "input", "previous_input_messages"})
"""Fields that the models' own validators complete before they are checked."""


class InvalidItemsError(Exception):
    """errors: pydantic's, as of the whole body. body: as much of the body as they are about."""

    def __init__(self, errors: list[Any], body: dict[str, Any]) -> None:
        super().__init__(errors)
        self.errors, self.body = errors, body


@dataclass(frozen=True)
class RequestModel:
    """names: the fields. nullable: those that may be left out. numbers: those that hold one number. lists: of objects.

    adapter: validates a body; None for a route whose model is not known, of which every field passes. fields: validate
    one field each, of those that the model's own validators take as they come.
    """

    names: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    adapter: TypeAdapter[Any] | None = None
    fields: Mapping[str, TypeAdapter[Any]] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        return self.adapter is not None

    @classmethod
    def of(cls, annotation: Any) -> "RequestModel":
        """Of a request model, or of a union of some."""
        models = [part for part in _branches(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        found: dict[str, list[Any]] = {}
        required: set[str] = set()
        for model in models:
            for name, info in model.model_fields.items():
                spelled = info.alias or name
                found.setdefault(spelled, []).append(Annotated[(info.annotation, *info.metadata, None)])
                if info.is_required():
                    required.add(spelled)
        lists = frozenset(name for name, kinds in found.items() if any(map(_is_list_of_objects, kinds)))
        return cls(
            frozenset(found),
            frozenset(found) - required,
            frozenset(name for name, kinds in found.items() if any(map(_is_number, kinds))),
            lists,
            TypeAdapter(annotation),
            {name: _adapter(kinds) for name, kinds in found.items() if name not in MESSAGES},
        )

    def check_field(self, name: str, raw: bytes) -> None:
        """Validate one field alone: a validator of the model that meets another type in it may fail by itself. Raises
        InvalidItemsError."""
        if (adapter := self.fields.get(name)) is None:
            return
        value = msgspec.json.decode(raw)
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            problems = [{**one, "loc": ("body", name, *one["loc"])} for one in error.errors(include_url=False)]
            raise InvalidItemsError(problems, {name: value}) from None

    def check_items(self, name: str, raw: bytes) -> Iterator[None]:
        """Validate the list `raw` of the field `name`; pauses after every few elements. Raises InvalidItemsError."""
        assert self.adapter is not None
        items = msgspec.json.decode(raw, type=list[msgspec.Raw])
        for start in range(0, len(items), CHUNK):
            chunk = [msgspec.json.decode(item) for item in items[start : start + CHUNK]]
            if problems := self._problems(name, chunk):
                shifted = [{**error, "loc": _shifted(error["loc"], name, start)} for error in problems]
                raise InvalidItemsError(shifted, {name: [None] * start + chunk})
            yield

    def _problems(self, name: str, chunk: list[Any]) -> list[Any]:
        """What the model has against these elements; what it has against the rest, it will say itself."""
        assert self.adapter is not None
        try:
            self.adapter.validate_python({name: list(chunk)})
        except ValidationError as error:
            return [one for one in error.errors(include_url=False) if name in one["loc"][:2] and len(one["loc"]) > 1]
        except Exception:  # a validator of the model; it sees the whole body, and says so, later
            return []
        return []


def _shifted(location: tuple[Any, ...], name: str, start: int) -> tuple[Any, ...]:
    """An error's place in the whole body: the first index after the field's name counts from the list's beginning."""
    parts = list(location)
    for position in range(parts.index(name) + 1, len(parts)):
        if isinstance(parts[position], int):
            parts[position] += start
            break
    return ("body", *parts)


def check_content(name: str, raw: bytes, path: str) -> Iterator[None]:
    """Check what the models let pass in a list of messages or input items and vLLM's handlers cannot read; pauses after
    every few elements. Raises InvalidRequestError."""
    for number, item in enumerate(msgspec.json.decode(raw, type=list[msgspec.Raw])):
        value = msgspec.json.decode(item)
        if isinstance(value, dict) and isinstance(content := value.get("content"), list):
            place = f"{name}.{number}.content"
            if name == "input" and value.get("role") == "assistant":
                _check_answer(place, content)
            for position, part in enumerate(content):
                _check_part(f"{place}.{position}", part)
        if isinstance(value, dict):
            _check_message(f"{name}.{number}", value, path)
        if number % CHUNK == CHUNK - 1:
            yield


def _check_message(place: str, message: dict[str, Any], path: str) -> None:
    if not place.startswith("messages."):
        check_input_item(place, message)
    elif path.startswith("/v1/messages"):
        check_anthropic_message(place, message)
    else:
        check_chat_message(place, message)


def _check_answer(place: str, content: list[Any]) -> None:
    """An answer of the model's, sent back: vLLM reads its first part, which must be text."""
    found = content[0].get("type") if content and isinstance(content[0], dict) else None
    if not content or found == "refusal":
        shown = "a refusal" if content else "no part"
        raise InvalidRequestError(f"{place}: found {shown} first, expected text (output_text)", param=place)


def _check_part(place: str, part: Any) -> None:
    audio = part.get("input_audio") if isinstance(part, dict) else None
    if not isinstance(audio, dict | None):
        place = f"{place}.input_audio"
        raise InvalidRequestError(f"{place}: found another value, expected an object", param=place)
    check_text(place, part)


def _adapter(kinds: list[Any]) -> TypeAdapter[Any]:
    """Validates what is of one of these types."""
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    return TypeAdapter(union)


def _branches(annotation: Any) -> tuple[Any, ...]:
    """The branches of a union, without what annotates them."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(branch for part in get_args(annotation) for branch in _branches(part))
    if hasattr(annotation, "__metadata__"):
        return _branches(get_args(annotation)[0])
    return (annotation,)


def _is_number(annotation: Any) -> bool:
    branches = set(_branches(annotation)) - {type(None), bool}
    return bool(branches) and branches <= {int, float}


def _is_list_of_objects(annotation: Any) -> bool:
    for branch in _branches(annotation):
        if get_origin(branch) is list:
            items = _branches(get_args(branch)[0])
            return not all(item in (int, str, bytes) or get_origin(item) is list for item in items)
    return False
