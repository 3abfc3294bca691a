"""Owns how large a structured-output spec may be before anything reads it further.

Invariant: a spec that passes has bounded bytes, nesting, references, choices, properties, counts and repetitions; the
check takes time linear in its size, recurses nowhere and calls nothing native but Python's own JSON reader.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from server.errors import InvalidRequestError
from server.structured_outputs.patterns import pattern_size, syntax_characters
from server.structured_outputs.spec import Spec

MAX_DEPTH = 64
"""Nested objects and arrays of a JSON schema, as in vLLM; the same for the parentheses of a pattern."""
MAX_TAG_DEPTH = 80
"""A structural tag wraps its schemas; as in vLLM."""
MAX_REFS = 1_000
MAX_REF_TARGETS = 256
"""Different targets of `$ref`: no chain of references is longer."""
MAX_CHOICES = 5_000
MAX_PROPERTIES = 5_000
MAX_COUNT = 100_000
MAX_OPTIONAL_PRODUCT = 10_000
"""Properties times how many of them there may be: a grammar has to count them."""
MAX_PATTERN_SIZE = 100_000
MAX_SYNTAX = 10_000
MAX_STOP_TOKENS = 1_024

_COUNTS = (
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)
_JSON_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{\]}]', re.DOTALL)


def check_bounds(spec: Spec, max_bytes: int) -> None:
    """Raises InvalidRequestError with the bound that the spec breaks."""
    if isinstance(spec.value, str) and len(spec.value) > max_bytes:
        raise _too_many_bytes(len(spec.value), max_bytes)
    value = _value_of(spec)
    _check_depth(value, MAX_TAG_DEPTH if spec.kind == "structural_tag" else MAX_DEPTH, max_bytes)
    _check_text(spec, max_bytes)
    if len(spec.stop_tokens) > MAX_STOP_TOKENS:
        raise _too_large("stop token ids beside structured outputs", len(spec.stop_tokens), MAX_STOP_TOKENS)
    if spec.kind in ("regex", "grammar"):
        _check_pattern(str(value), spec.kind)
    elif spec.kind == "choice":
        _check_count("choices", len(value), MAX_CHOICES)
    elif isinstance(value, dict | list):
        _check_schema(value)


def _value_of(spec: Spec) -> Any:
    """The value, read where it is JSON in a string. JSON that cannot be read is the compiler's to explain."""
    if spec.kind not in ("json", "structural_tag") or not isinstance(spec.value, str):
        return spec.value
    depth = deepest = 0
    for match in _JSON_TOKENS.finditer(spec.value):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    limit = MAX_TAG_DEPTH if spec.kind == "structural_tag" else MAX_DEPTH
    if deepest > limit:
        raise _too_deep(limit)
    try:
        return json.loads(spec.value)
    except ValueError:
        return None


def _check_depth(value: Any, limit: int, max_bytes: int) -> None:
    level, counted = [value], 0
    for _ in range(limit):
        counted += sum(len(_children(node)) for node in level)
        if counted > max_bytes:  # each takes a byte at least
            raise _too_many_bytes(counted, max_bytes)
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list | tuple)]
        if not level:
            return
    raise _too_deep(limit)


def _check_text(spec: Spec, max_bytes: int) -> None:
    """Its bytes, and that they are Unicode: half a surrogate pair cannot be sent to the engine."""
    try:
        size = len(json.dumps(spec.value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "the structured-output spec holds half a surrogate pair; expected Unicode text: send whole characters"
        ) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the structured-output spec is not JSON: {error}") from None
    if size > max_bytes:
        raise _too_many_bytes(size, max_bytes)


def _check_schema(value: Any) -> None:
    refs: set[str] = set()
    count = properties = choices = 0
    for node in _objects(value):
        if isinstance(ref := node.get("$ref"), str):
            count += 1
            refs.add(ref)
            if not ref.startswith("#"):
                raise InvalidRequestError(
                    f"found a $ref to {ref[:80]!r} in the structured-output spec, expected one that begins with #: "
                    "references lead only into the schema itself"
                )
        choices += len(enum) if isinstance(enum := node.get("enum"), list) else 0
        if isinstance(named := node.get("properties"), dict):
            properties += len(named)
            _check_optional(node, len(named))
        if isinstance(pattern := node.get("pattern"), str):
            _check_pattern(pattern, "pattern")
        if isinstance(named := node.get("patternProperties"), dict):
            for pattern in named:
                _check_pattern(pattern, "pattern")
        for keyword in _COUNTS:
            number = node.get(keyword)
            if isinstance(number, int | float) and not number <= MAX_COUNT:
                raise _too_large(f"as {keyword}", number, MAX_COUNT)
    _check_count("$refs", count, MAX_REFS)
    _check_count("different targets of $ref", len(refs), MAX_REF_TARGETS)
    _check_count("enum values", choices, MAX_CHOICES)
    _check_count("properties", properties, MAX_PROPERTIES)


def _check_optional(node: Mapping[str, Any], properties: int) -> None:
    bounds = [node.get(keyword) for keyword in ("minProperties", "maxProperties")]
    counted = max((min(int(bound), properties) for bound in bounds if isinstance(bound, int)), default=0)
    _check_count("properties times minProperties or maxProperties", properties * counted, MAX_OPTIONAL_PRODUCT)


def _check_pattern(text: str, kind: str) -> None:
    _check_count(f"characters of syntax in a {kind}", syntax_characters(text), MAX_SYNTAX)
    found = pattern_size(text, is_grammar=kind == "grammar")
    _check_count(f"nested parentheses in a {kind}", found.depth, MAX_DEPTH)
    _check_count(f"atoms in a {kind}, its repetitions written out", found.size, MAX_PATTERN_SIZE)


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += [child for child in _children(node) if isinstance(child, dict | list | tuple)]


def _children(node: Any) -> Collection[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list | tuple) else ()


def _check_count(what: str, found: int, limit: int) -> None:
    if found > limit:
        raise _too_large(what, found, limit)


def _too_large(what: str, found: float, limit: int) -> InvalidRequestError:
    shown = str(found)[:20]
    return InvalidRequestError(f"the structured-output spec is too large: found {shown} {what}, expected <= {limit}")


def _too_many_bytes(found: int, limit: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the structured-output spec is too large: found at least {found} bytes (the schemas of tools that must be "
        f"called count), expected at most {limit} (the setting structured_max_bytes)"
    )


def _too_deep(limit: int) -> InvalidRequestError:
    return InvalidRequestError(f"the structured-output spec is nested more than {limit} levels deep: flatten it")
