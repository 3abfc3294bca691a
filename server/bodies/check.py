"""Owns the check of a whole body before vLLM parses it, from the cheapest to the dearest.

Invariant: a body that passes costs vLLM's event loop a bounded time to parse and to validate, and holds nothing that
vLLM answers with a server error because of its type or size.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from server.bodies import structure
from server.bodies.body_fields import BodyFields
from server.bodies.fields import (
    TYPED_FIELDS,
    check_ignored,
    check_lists,
    check_not_empty,
    check_request_id,
    check_template_arguments,
    count_sequences,
    drop_empty_tools,
)
from server.bodies.limits import KEPT_BYTES, MAX_DEPTH, MAX_FIELD_VALUES, MAX_SCHEMA_VALUES, BodyLimits
from server.bodies.models import CHUNK, MESSAGES, RequestModel, check_content
from server.bodies.rules.unserved import CHAT, check_chat_options, check_served
from server.errors import InvalidRequestError
from server.sharing.budget import BodyBudget
from server.sharing.turns import Turns

SCHEMA_FIELDS = frozenset(
    {"messages", "input", "tools", "response_format", "structured_outputs", "text", "output_config", "system"}
)
"""Fields with a caller's own JSON inside, in which no number is computed with."""
_SCHEMAS = SCHEMA_FIELDS - {"messages", "input", "system"}
_NUMBER = re.compile(rb'"\s*[-+]?[0-9]{1,18}(\.[0-9]{0,40})?\s*"')
UNKNOWN = RequestModel()
HEAVY_VALUES = 512
"""A body with more values than this takes its turn like one over KEPT_BYTES."""


@dataclass(frozen=True)
class BodyCheck:
    """The rules of one route. path: the route's. takes_tools: see `check_served`."""

    path: str
    model: RequestModel
    limits: BodyLimits
    generates: bool = True
    takes_tools: bool = True

    def is_heavy(self, body: bytes) -> bool:
        """Whether the body takes its turn: parsing it may take noticeable time."""
        return len(body) > KEPT_BYTES or structure.count(body, HEAVY_VALUES) > HEAVY_VALUES

    def apply(self, fields: BodyFields) -> Iterator[None]:
        """Check the fields and leave only what vLLM is to see; pauses where others may go on. Raises
        InvalidRequestError, or InvalidItemsError."""
        if self.model.is_known:
            if self.generates:
                check_ignored(fields, self.path, self.model.names)
            if self.path == CHAT:
                check_chat_options(fields)
            fields.keep(self.model.names)
            fields.drop([name for name in self.model.nullable if fields.is_null(name)])
        drop_empty_tools(fields)
        yield
        self._check_structure(fields)
        yield
        check_lists(fields, self.limits)
        check_request_id(fields)
        check_not_empty(fields)
        check_template_arguments(fields)
        check_served(fields, self.path, self.takes_tools)
        yield
        count_sequences(fields, self.limits)
        yield
        for name in self.model.lists:
            if fields.raw(name)[:1] == b"[" and structure.count(fields.raw(name), CHUNK) > CHUNK:
                yield from self.model.check_items(name, fields.raw(name))
            if name in MESSAGES and fields.raw(name)[:1] == b"[":
                yield from check_content(name, fields.raw(name), self.path)
        for name in fields.names:
            if name not in TYPED_FIELDS:
                self.model.check_field(name, fields.raw(name))

    def _check_structure(self, fields: BodyFields) -> None:
        values = 0
        for name in fields.names:
            raw = fields.raw(name)
            is_long = name in TYPED_FIELDS
            if is_long or name in self.model.lists:
                most = self.limits.values
            else:
                most = MAX_SCHEMA_VALUES if name in _SCHEMAS else MAX_FIELD_VALUES
            if not is_long:
                values += (found := structure.count(raw, most))
                if found > most or values > self.limits.values:
                    raise _too_many(name, "more JSON values", most if found > most else self.limits.values)
            if (levels := structure.depth(raw)) > MAX_DEPTH:
                raise InvalidRequestError(
                    f"{name}: found {levels} levels of arrays and objects, expected at most {MAX_DEPTH}", param=name
                )
            if not is_long or raw[:1] != b"[":
                self._check_numbers(name, raw)
            if name in self.model.lists and levels and raw[:1] == b"[":
                self._check_lists(name, raw)

    def _check_numbers(self, name: str, raw: bytes) -> None:
        bad = structure.bad_number(raw, name in SCHEMA_FIELDS)
        if bad is None and name in self.model.numbers and raw[:1] == b'"' and not _NUMBER.fullmatch(raw):
            bad = ascii(raw[:40].decode(errors="replace"))[1:-1]
        if bad is not None:
            raise InvalidRequestError(f"{name}: found {bad}, expected a number of at most 64 bits", param=name)

    def _check_lists(self, name: str, raw: bytes) -> None:
        items, largest = structure.elements(raw)
        if items > self.limits.items:
            raise _too_many(name, f"{items} elements", self.limits.items)
        most = MAX_SCHEMA_VALUES if name in _SCHEMAS else MAX_FIELD_VALUES
        if largest > most:
            raise _too_many(name, f"an element with {largest} JSON values", most)


def _too_many(name: str, found: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: found {found}, expected at most {most}", param=name)


@dataclass(frozen=True)
class RequestBodies:
    """What the requests of one server share. models: path -> what is known of the request model there. takes_tools:
    see `check_served`."""

    limits: BodyLimits = field(default_factory=BodyLimits)
    models: Mapping[str, RequestModel] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)
    takes_tools: bool = True
    budget: BodyBudget = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", BodyBudget(self.limits.budget))

    def check_of(self, path: str, generates: bool) -> BodyCheck:
        """The check of a route."""
        return BodyCheck(path, self.models.get(path, UNKNOWN), self.limits, generates, self.takes_tools)
