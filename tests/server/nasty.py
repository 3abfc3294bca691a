"""Bodies that nobody means, made from the schema of a route's request model: every field of it, nested ones too, with
every value of a fixed list.

The values are JSON text, because some of them (half a surrogate pair, numbers beyond every type) have no other form.
"""

import json
from collections.abc import Iterator
from typing import Any

DEPTH = 4
"""Levels of objects in which fields are replaced."""
BRANCHES = 8
"""Kinds of one field that are tried."""
HALF = '"t3 \\ud83d"'
HUGE = "1" + "0" * 23
NUMBERS = (
    "0", "-1", "0.5", "2147483648", "9223372036854775807", "-9223372036854775808", "9223372036854775808", HUGE,
    f"-{HUGE}", "1" + "0" * 400, "1" + "0" * 5000, "1e23", "1e308", "-1e308", "1e400", "-0.0", "5e-324",
)  # fmt: skip
STRINGS = (
    '""', '"?"', '"\\u0000"', '"1e400"', '"nan"', '"' + "9" * 30 + '"', '"' + "t3 " * 500 + '"', HALF,
)  # fmt: skip
ARRAYS = (
    "[]", "[null]", "[[]]", "[[[]]]", "[0]", "[-1]", "[[-1]]", f"[{HUGE}]", f"[[{HUGE}]]", "[true]", "[1e308]",
    '[""]', '["?"]', "[{}]", f"[{HALF}]", f"[[{HALF}]]", f'[{{"type": "text", "text": {HALF}}}]', '[{"type": "?"}]',
    '[{"role": "user", "content": [{"type": "?"}]}]', "[" * 60 + "]" * 60, "[" * 70 + "]" * 70,
)  # fmt: skip
OBJECTS = (
    "{}", '{"": null}', '{"a": null}', '{"a": "?"}', '{"5": 1e308}', f'{{"5": {HUGE}}}', '{"-5": 1}',
    f'{{"{HUGE}": 1}}', '{"5": "?"}', '{"5": []}', '{"a": {"b": {"c": []}}}', '{"a": [1, "?"]}', '{"type": "?"}',
    '{"type": []}', f"{{{HALF}: 1}}", f'{{"a": [{{"b": {HALF}}}]}}', '{"a":' * 60 + "1" + "}" * 60,
)  # fmt: skip
VALUES = ("null", "true", *NUMBERS, *STRINGS, *ARRAYS, *OBJECTS)
"""Of every type, and of every size in which a type has been one too small."""
NESTED = (
    "null",
    "true",
    "-1",
    "1e308",
    "1" + "0" * 23,
    '""',
    '"?"',
    HALF,
    "[]",
    "[[]]",
    "[null]",
    '["?"]',
    "{}",
    '{"a": null}',
)
"""For fields of objects within the body."""


def bodies(schema: dict[str, Any], valid: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name and text of each body, each once. schema: of the request model. valid: a body that is answered."""
    for place, text in dict.fromkeys(_changed(schema, schema.get("$defs", {}), DEPTH)):
        field, _, _ = place.partition(" ")
        rest = json.dumps({name: value for name, value in valid.items() if name != field})[1:-1]
        yield place, f"{{{rest}{', ' if rest else ''}{text[1:]}".encode()


def _changed(schema: dict[str, Any], defs: dict[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    """For every field of an object: objects with that field alone, or with what else is required below the top."""
    for branch in _branches(schema, defs):
        required = {} if depth == DEPTH else _required(branch, defs, 3)
        for name, field in branch.get("properties", {}).items():
            if depth == DEPTH and name == "model":
                continue
            others = "".join(f", {json.dumps(key)}: {value}" for key, value in required.items() if key != name)
            for value in VALUES if depth == DEPTH else NESTED:
                yield f"{name} = {value[:40]}", f"{{{json.dumps(name)}: {value}{others}}}"
            if depth > 1:
                for place, text in _inside(field, defs, depth):
                    yield f"{name} . {place}", f"{{{json.dumps(name)}: {text}{others}}}"


def _inside(schema: dict[str, Any], defs: dict[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    """Values of a field in which one nested field is replaced."""
    for branch in list(_branches(schema, defs))[:BRANCHES]:
        if "properties" in branch:
            yield from _changed(branch, defs, depth - 1)
        elif "items" in branch:
            for place, text in _inside(branch["items"], defs, depth):
                yield place, f"[{text}]"


def _branches(schema: dict[str, Any], defs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a schema may be, without references."""
    if "$ref" in schema:
        yield from _branches(defs[schema["$ref"].rpartition("/")[2]], defs)
    elif parts := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        for part in parts:
            yield from _branches(part, defs)
    else:
        yield schema


def _required(schema: dict[str, Any], defs: dict[str, Any], depth: int) -> dict[str, str]:
    """The required fields of an object, as JSON text that fits."""
    fields = schema.get("properties", {})
    return {name: _valid(fields.get(name, {}), defs, depth) for name in schema.get("required", ())}


def _valid(schema: dict[str, Any], defs: dict[str, Any], depth: int) -> str:
    branch = next(_branches(schema, defs))
    if "const" in branch or "enum" in branch:
        return json.dumps(branch.get("const", branch.get("enum", [None])[0]))
    if branch.get("type") == "object" and depth:
        fields = _required(branch, defs, depth - 1)
        return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}"
    plain = {"string": '"t3"', "integer": "1", "number": "1", "boolean": "true", "array": "[]", "null": "null"}
    return plain.get(branch.get("type", "object"), "{}")
