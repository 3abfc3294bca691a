"""A1 to A3: structured-output specs that crash or stop a server which compiles them as they come."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from server.structured_outputs.spec import Spec
from tests.abuse.target import Attack, Ends, Target, post_all


@dataclass(frozen=True)
class Hostile:
    """is_out_of_bounds: refused by its size alone; else the compile is what ends."""

    spec: Spec
    is_out_of_bounds: bool = True


def _optional(count: int, least: int, most: int) -> dict[str, Any]:
    properties = {f"p{number}": {"type": "integer"} for number in range(count)}
    return {"type": "object", "properties": properties, "minProperties": least, "maxProperties": most}


def _chain(links: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(links)}
    return {"$defs": {**defs, f"d{links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _any_of_tree(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {}
    for number in range(levels):
        ref = {"$ref": f"#/$defs/d{number + 1}"}
        defs[f"d{number}"] = {"anyOf": [ref, {"type": "array", "items": ref}, {"oneOf": [ref, ref]}]}
    return {"$defs": {**defs, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def tagged(schema: Any) -> str:
    return json.dumps({"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f"]})


def _tagged_regex(pattern: str) -> str:
    return json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": pattern}})


NULLABLE = 'root ::= a a a a a a a a "x"\na ::= b b b b b b b b\nb ::= "" | [a-z] b'

HOSTILE: dict[str, Hostile] = {
    "50000 parentheses in a pattern": Hostile(Spec("json", {"type": "string", "pattern": "(" * 50_000 + ")" * 50_000})),
    "5000 parentheses in a pattern": Hostile(Spec("json", {"type": "string", "pattern": "(" * 4_900 + ")" * 4_900})),
    "parentheses in a regex": Hostile(Spec("regex", "(" * 30_000 + "a" + ")" * 30_000)),
    "parentheses in a grammar": Hostile(Spec("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000)),
    "parentheses in lark": Hostile(Spec("grammar", "start: " + "(" * 4_000 + '"a"' + ")" * 4_000)),
    "parentheses in a tag": Hostile(Spec("structural_tag", _tagged_regex("(" * 4_000 + ")" * 4_000))),
    "parentheses in a key": Hostile(Spec("json", {"patternProperties": {"(" * 4_000 + ")" * 4_000: {}}})),
    "escaped parentheses in a schema's text": Hostile(Spec("json", '{"pattern": "' + "\\u0028" * 9_000 + '"}')),
    "8000 references": Hostile(Spec("json", _chain(8_000))),
    "900 references": Hostile(Spec("json", _chain(900))),
    "1200 optional properties": Hostile(Spec("json", _optional(1_200, 300, 600))),
    "250 optional properties": Hostile(Spec("json", _optional(250, 60, 120))),
    "100000 choices": Hostile(Spec("choice", [f"w{number}" for number in range(100_000)])),
    "100000 of an enum": Hostile(Spec("json", {"enum": [f"w{number}" for number in range(100_000)]})),
    "a choice of a megabyte": Hostile(Spec("choice", ["a" * 1_000_000])),
    "a const of a megabyte": Hostile(Spec("json", {"const": "é" * 150_000})),
    "repetitions that multiply": Hostile(Spec("regex", "(a{1,1000}){1,1000}")),
    "repetitions that multiply in a schema": Hostile(Spec("json", {"type": "string", "pattern": "((a{99}){99}){99}"})),
    "repetitions in a grammar": Hostile(Spec("grammar", 'root ::= (("a"{1,900}){1,900}){1,900}')),
    "an endless string": Hostile(Spec("json", {"type": "string", "minLength": 10**9})),
    "an endless array": Hostile(Spec("json", {"type": "array", "minItems": 10**30})),
    "a deep schema": Hostile(Spec("json", '{"items":' * 6_000 + "{}" + "}" * 6_000)),
    "a deep tag": Hostile(Spec("structural_tag", tagged(json.loads('{"items":' * 90 + "{}" + "}" * 90)))),
    "a wide schema": Hostile(Spec("json", {"anyOf": [{}] * 200_000})),
    "nullable and left recursive": Hostile(Spec("grammar", 'root ::= (root root root | "" | [^x])*'), False),
    "rules that multiply": Hostile(
        Spec("grammar", "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1}{{1,90}}" for n in range(9)), 'r9 ::= "a"'])),
        False,
    ),
    "a rule of itself": Hostile(Spec("grammar", "root ::= root"), False),
    "a reference to itself": Hostile(Spec("json", {"$ref": "#"}), False),
    "a reference to nothing": Hostile(Spec("json", {"$ref": "#/$defs/none"}), False),
    "a reference elsewhere": Hostile(Spec("json", {"$ref": "http://localhost/schema"})),
    "a tuple of draft 7": Hostile(Spec("json", {"type": "array", "items": [{"type": "string"}]}), False),
    "what xgrammar lacks": Hostile(
        Spec("json", {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}}), False
    ),
    "two of allOf": Hostile(Spec("json", {"allOf": [{"type": "string"}, {"enum": ["a"]}]}), False),
    "an unknown format": Hostile(Spec("json", {"type": "string", "format": "%n%n%n"}), False),
    "no grammar": Hostile(Spec("grammar", "???"), False),
    "no JSON": Hostile(Spec("json", '{"type":'), False),
    "no tag": Hostile(Spec("structural_tag", '{"structures": [{}], "triggers": []}'), False),
    "no regex": Hostile(Spec("regex", "(a"), False),
}
"""Each is refused with 400, and nothing else happens."""

COSTLY: dict[str, Spec] = {
    "ambiguous": Spec("regex", "(.?){200}"),
    "more ambiguous": Spec("regex", "(.*.*.*)*x"),
    "nullable rules": Spec("grammar", NULLABLE),
    "expensive at first": Spec("regex", "(a?){100}(b?){100}(.?){50}"),
    "words without an order": Spec("grammar", 'root ::= root root | "a" | "b" | "ab"'),
}
"""Refused or served, by the vocabulary: each of these costs more the more tokens there are."""

ORDINARY: dict[str, Spec] = {
    "any object": Spec("json_object", True),
    "a person": Spec(
        "json",
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    ),
    "a schema as text": Spec("json", '{"type": "object", "properties": {"a": {"type": "boolean"}}}'),
    "references": Spec("json", {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
                                "$ref": "#/$defs/n"}),
    "a chain": Spec("json", _chain(30)),
    "fifty fields": Spec("json", {"type": "object", "properties": {
        f"f{n}": {"type": ["string", "null"]} if n % 2 else {"type": "array", "items": {"enum": ["x", "y"]}}
        for n in range(50)}}),
    "ten of twenty": Spec("json", _optional(20, 1, 10)),
    "a few branches": Spec("json", _any_of_tree(5)),
    "a pattern": Spec("json", {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"}),
    "a length": Spec("json", {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 20}),
    "a phone number": Spec("regex", r"\+?[0-9]{1,3}( [0-9]{2,4}){1,4}"),
    "yes or no": Spec("choice", ["yes", "no"]),
    "many choices": Spec("choice", [f"label {number}" for number in range(500)]),
    "a grammar": Spec("grammar", 'root ::= "SELECT " name\nname ::= [a-z]+'),
    "lark": Spec("grammar", 'start: "a" | "b" start'),
    "a tag": Spec("structural_tag", tagged({"type": "object"})),
}  # fmt: skip
"""Each is served."""


def body_of(base: str, spec: Spec, **more: Any) -> dict[str, Any]:
    """A request of /v1/completions with that spec."""
    return {"model": base, "prompt": "a", "max_tokens": 4, "structured_outputs": {spec.kind: spec.value}, **more}


def chat_of(base: str, spec: Spec, **more: Any) -> dict[str, Any]:
    return {
        "model": base, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4,
        "structured_outputs": {spec.kind: spec.value}, **more,
    }  # fmt: skip


def response_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


async def all_at_once(target: Target) -> Ends:
    """Every hostile spec, together."""
    bodies: list[bytes | dict[str, Any]] = [body_of(target.base, hostile.spec) for hostile in HOSTILE.values()]
    return await post_all(target, "/v1/completions", bodies)


async def expensive(target: Target) -> Ends:
    """Specs within the bounds, each unlike the others, that take as long to compile as they can."""
    schemas: Iterable[Any] = (
        schema
        for number in range(8)
        for schema in (_optional(90 + number, 30, 60), {"type": "string", "maxLength": 5_000 + number})
    )
    bodies: list[bytes | dict[str, Any]] = [
        {"model": target.base, "prompt": "a", "max_tokens": 4, "response_format": response_format(schema)}
        for schema in schemas
    ]
    return await post_all(target, "/v1/completions", bodies)


async def left_alone(target: Target) -> Ends:
    """The same, but the client goes away at once."""
    specs = [Spec("json", _optional(90 + number, 30, 61)) for number in range(8)]
    return await post_all(target, "/v1/completions", [body_of(target.base, spec) for spec in specs], leave_after_s=0.3)


async def delayed(target: Target) -> Ends:
    """Grammars that are cheap until some tokens are out."""
    patterns = [f"[ab]{{{length}}}(.?){{200}}" for length in range(90, 102)]
    bodies: list[bytes | dict[str, Any]] = [
        body_of(target.base, Spec("regex", pattern), max_tokens=150, ignore_eos=True) for pattern in patterns
    ]
    return await post_all(target, "/v1/completions", bodies)


async def costly(target: Target) -> Ends:
    """Grammars whose every token is expensive, where the vocabulary is large."""
    bodies: list[bytes | dict[str, Any]] = [
        body_of(target.base, spec, max_tokens=150, ignore_eos=True) for spec in COSTLY.values() for _ in range(3)
    ]
    return await post_all(target, "/v1/completions", bodies)


async def tools(target: Target) -> Ends:
    """A thousand functions of which one must be called, and schemas of tools that are as bad as any."""
    many = [{"type": "function", "function": {"name": f"f{n}", "parameters": {"type": "object", "properties": {
        "a": {"type": "string", "description": "d" * 50}}}}} for n in range(1_000)]  # fmt: skip
    bad = [{"type": "function", "function": {"name": "f", "parameters": _optional(1_200, 300, 600)}}]
    chat = {"model": target.base, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    bodies: list[bytes | dict[str, Any]] = [{**chat, "tools": each, "tool_choice": "required"} for each in (many, bad)]
    return await post_all(target, "/v1/chat/completions", bodies)


async def rounds(target: Target) -> Ends:
    """One after the other, so that what one leaves behind meets the next."""
    ends: Ends = Counter()
    for hostile in HOSTILE.values():
        ends += await post_all(target, "/v1/completions", [body_of(target.base, hostile.spec)])
        await asyncio.sleep(0)
    return ends


ATTACKS: dict[str, Attack] = {
    "specs at once": all_at_once,
    "expensive specs": expensive,
    "expensive specs, left": left_alone,
    "specs that turn expensive": delayed,
    "costly specs": costly,
    "specs of tools": tools,
    "specs one by one": rounds,
}
EXPECTED: dict[str, set[str]] = {
    "specs at once": {"400"},
    "expensive specs": {"200", "400"},
    "expensive specs, left": {"left", "200", "400"},
    "specs that turn expensive": {"200", "400"},
    "costly specs": {"200", "400"},
    "specs of tools": {"400"},
    "specs one by one": {"400"},
}
