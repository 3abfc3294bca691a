"""Owns how pydantic's errors are put for a caller: by the fields that the caller wrote, in the words of JSON.

Invariant: nothing of Python shows: no class, no repr, no name of a branch of a union.
"""

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from adapters.format.strict_json import json_kind
from adapters.names import NAME_PATTERN, NAME_RULE

_UNKNOWN: Any = object()
"""A part of the body that is not known."""


def field_problems(found: Sequence[Any], body: Any = None, known: Sequence[str] = ()) -> dict[str | None, str]:
    """Pydantic's errors by the caller's field ("messages.0.content"; None: the body as a whole), at most ten.

    body: the parsed body, which shows what is a field and what the name of a branch of a union. known: the fields that
    the body may have, for a hint about one that it may not.
    """
    problems: dict[str | None, list[str]] = {}
    likely = _likely([_located(error, body, known) for error in found[:1000]])
    for error in sorted(likely, key=lambda error: error.kind == "missing"):  # of another form of the body, maybe
        said = problems.setdefault(error.field, [])
        if error.problem not in said:
            said.append(error.problem)
    return {field: _joined(said) for field, said in list(problems.items())[:10]}


FAULTS = {"literal_error": 4, "missing": 3}
"""What tells, by pydantic's type of an error, that the caller meant another branch. Another type than expected counts
2, any other error 1."""


class _Located(NamedTuple):
    """An error and its way through the body: (the name, whether it is a field's and not that of a union's branch)."""

    way: tuple[tuple[str, bool], ...]
    problem: str
    kind: str

    @property
    def field(self) -> str | None:
        return ascii(".".join(name for name, is_field in self.way if is_field))[1:-1][:100] or None


def _likely(errors: list[_Located], depth: int = 0) -> list[_Located]:
    """The errors that the caller has made. Of the branches of a union, which all failed, those count that fit the value
    itself, if any does, and of them the ones with the fewest faults."""
    likely: list[_Located] = []
    by_step: dict[tuple[str, bool] | None, list[_Located]] = {}
    for error in errors:
        by_step.setdefault(error.way[depth] if depth < len(error.way) else None, []).append(error)
    branches: list[list[_Located]] = []
    for step, group in by_step.items():
        if step is None:
            likely += group
        elif step[1]:
            likely += _likely(group, depth + 1)
        else:
            branches.append(_likely(group, depth + 1))
    fitting = [branch for branch in branches if all(any(part for _, part in e.way[depth:]) for e in branch)]
    branches = fitting or branches
    fewest = min(map(_faults, branches), default=0)
    return likely + [error for branch in branches if _faults(branch) == fewest for error in branch]


def _faults(errors: list[_Located]) -> int:
    """How far a value is from what a branch expects."""
    return sum({error.field: FAULTS.get(error.kind, 1 + error.kind.endswith("_type")) for error in errors}.values())


def _joined(problems: list[str]) -> str:
    """The problems of one field: what the branches of a union expect is an alternative."""
    found = {problem.partition(", expected ")[0] for problem in problems}
    if len(problems) > 1 and len(found) == 1 and all(", expected " in problem for problem in problems):
        return f"{found.pop()}, expected " + " or ".join(p.partition(", expected ")[2] for p in problems[:4])
    return ", ".join(problems[:4])


def _located(error: Any, body: Any, known: Sequence[str] = ()) -> _Located:
    """An error with its way, which pydantic gives with the names of branches of unions among the fields."""
    where, *parts = error["loc"] or ("body",)
    body = _UNKNOWN if body is None else body
    if error["type"] == "json_invalid":
        parts = []
    way: list[tuple[str, bool]] = []
    for position, part in enumerate(parts):
        is_missing = error["type"] == "missing" and position == len(parts) - 1
        is_field = True
        if where == "body" and body is not _UNKNOWN:
            is_item = isinstance(body, list | tuple) and isinstance(part, int) and part < len(body)
            if is_item or (isinstance(body, dict) and part in body):
                body = body[part]
            else:
                is_field = is_missing
        way.append((str(part), is_field))
    problem = _problem(error)
    if error["type"] == "extra_forbidden" and where == "body" and len(parts) == 1:
        likely = get_close_matches(str(parts[0])[:100].lower(), known, 1)
        problem += f" (did you mean {likely[0]}?)" if likely else ""
    elif error["type"] == "missing" and not parts:
        problem = "found nothing (an empty body, or null), expected a JSON object"
    return _Located(tuple(way), problem, error["type"])


_EXPECTED = re.compile(r"Input should be ")
_PHRASES = (
    (re.compile(r"\ban? valid (?:list|tuple)\b|\biterable\b|\blist\b"), "an array"),
    (
        re.compile(r"\ba valid dictionary(?: or (?:an )?instance of \w+| or object to extract fields from)?"),
        "an object",
    ),
    (re.compile(r"\ba valid (?=integer)"), "an "),
    (re.compile(r"\b(an?) valid\b"), r"\1"),
)
"""Pydantic's names of what it expects, and JSON's."""
_OF_PYTHON = (
    (re.compile(r"^(?:Value error|Assertion failed), "), ""),
    (re.compile(r"<class '(?:\w+\.)*(\w+)'>"), r"\1"),
    (re.compile(r"\bNone(?:Type)?\b"), "null"),
    (re.compile(r"^(?:List|Tuple)\b"), "the array"),
    (re.compile(r"^Dictionary\b"), "the object"),
)


def in_words_of_json(message: str) -> str:
    """A message for a caller, without Python's words."""
    for pattern, instead in _OF_PYTHON:
        message = pattern.sub(instead, message)
    return message


def problem_in_path(error: Any) -> str:
    """What is wrong with a part of a path."""
    found, problem = f"found {quote(error['input'])}", _problem(error)
    return f"{found} in the path" + (problem.removeprefix(found) if problem.startswith(found) else f": {problem}")


def _problem(error: Any) -> str:
    if error["type"] == "json_invalid":
        return f"not JSON ({error['ctx']['error']})"
    if error["type"] == "extra_forbidden":
        return "unknown field; remove it"
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"].strip("^$") == NAME_PATTERN:
        return f"found {quote(error['input'])}, expected {NAME_RULE}"
    message = in_words_of_json(error["msg"])
    if _EXPECTED.match(error["msg"]):
        for pattern, instead in _PHRASES:
            message = pattern.sub(instead, message)
        return f"found {quote(error['input'])}, expected {_EXPECTED.sub('', message, count=1)}"
    if error["type"] in ("value_error", "assertion_error"):
        return message
    return f"found {quote(error['input'])}; {message[:1].lower()}{message[1:]}"


def quote(value: Any) -> str:
    """A value as the caller wrote it, or its kind if it is a list or an object."""
    if value is not None and not isinstance(value, str | int | float):
        return json_kind(value)
    try:
        text = json.dumps(value[:100] if isinstance(value, str) else value)
    except ValueError:  # a number of more digits than Python writes
        text = "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."
