"""Owns the data files: JSON lines or one JSON list, of chats, prompts and completions, or LLM-Adapters' records.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}       ("input" may be absent or empty)

Other keys of a record are ignored. A byte order mark, Windows line ends and blank lines do no harm.
Invariant: every record becomes an example, or every problem of every file is told, with file and line.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.reading import check_plain, without_repeats

ROLES = ("system", "user", "assistant", "tool")
FORMATS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, '
    '{"prompt": ..., "completion": ...} or {"instruction": ..., "input": ..., "output": ...}'
)
KEYS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
MOST_BYTES = 16 * 1024**3
"""The largest data file: all of it is read."""
_WIDE = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant's turn.

    where: "FILE line N", or "FILE record N" of a JSON list. instruction, context: as LLM-Adapters' format has them; ""
    elsewhere.
    """

    where: str
    turns: tuple[Turn, ...]
    instruction: str = ""
    context: str = ""


def read_examples(files: Sequence[Path]) -> list[Example]:
    """The examples of all files, in their order. Raises InputError with every problem, each with its place."""
    examples: list[Example] = []
    problems: list[str] = []
    for file in files:
        before = len(examples) + len(problems)
        for where, record in _records(file, problems):
            try:
                examples.append(_example(where, record))
            except _ProblemError as problem:
                problems.append(f"{where}: {problem}")
        if len(examples) + len(problems) == before:
            problems.append(f"{file}: found no record, expected at least one")
    if problems:
        raise InputError("the data cannot be read", problems)
    return examples


class _ProblemError(Exception):
    """What is wrong with one record."""


def _records(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Where each record of a file is, and its JSON."""
    try:
        check_plain(file, MOST_BYTES)
        data = file.read_bytes()
    except InputError as error:
        problems.append(str(error).removeprefix("cannot read "))
        return
    except OSError as error:
        problems.append(f"{file}: {error.strerror}")
        return
    if data.startswith(_WIDE):
        problems.append(f"{file}: found text in UTF-16, expected UTF-8: save it as UTF-8")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(f"{file} line {line}: found bytes that are no UTF-8, expected UTF-8: save it as UTF-8")
        return
    if text.lstrip().startswith("["):
        yield from _listed(file, text, problems)
        return
    for number, each in enumerate(text.split("\n"), start=1):
        if each.strip():
            try:
                yield f"{file} line {number}", _parsed(each)
            except ValueError as error:
                problems.append(f"{file} line {number}: {_broken(error, each)}")


def _listed(file: Path, text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        records = _parsed(text)
    except json.JSONDecodeError as error:
        problems.append(f"{file} line {error.lineno}: found broken JSON ({error.msg}), expected one list of records")
        return
    except ValueError as error:
        problems.append(f"{file}: found broken JSON ({error}), expected one list of records")
        return
    for number, record in enumerate(records, start=1):
        yield f"{file} record {number}", record


def _parsed(text: str) -> Any:
    """A JSON value. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _broken(error: ValueError, line: str) -> str:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    hint = ": a record is one line of JSON" if line.strip() in ("{", "}", "},") else ""
    return f"found broken JSON ({reason}), expected one object{hint}"


def _example(where: str, record: Any) -> Example:
    if not isinstance(record, dict):
        raise _ProblemError(f"found {_kind(record)}, expected an object: {FORMATS}")
    if len(kinds := [" + ".join(keys) for keys in KEYS if set(keys) <= record.keys()]) > 1:
        raise _ProblemError(f"found the keys of several formats ({', '.join(kinds)}), expected those of one")
    if "messages" in record:
        return Example(where, _conversation("messages", record["messages"]))
    if "instruction" in record and "output" in record:
        instruction, context = _text(record, "instruction"), record.get("input") or ""
        if not isinstance(context, str):
            raise _ProblemError(f'"input": found {_kind(context)}, expected a string')
        _encodable(context, '"input"')
        asked = f"{instruction}\n\n{context}" if context else instruction
        turns = (Turn("user", asked), Turn("assistant", _text(record, "output")))
        return Example(where, turns, instruction, context)
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return Example(where, _conversation("prompt + completion", prompt + completion))
        turns = (Turn("user", _text(record, "prompt")), Turn("assistant", _text(record, "completion")))
        return Example(where, turns)
    found = ", ".join(json.dumps(key) for key in list(record)[:8]) or "no key"
    raise _ProblemError(f"found the keys {found}, expected {FORMATS}")


def _conversation(key: str, messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise _ProblemError(f'"{key}": found {_kind(messages)}, expected a list of messages')
    turns = tuple(_turn(number, message) for number, message in enumerate(messages, start=1))
    if turns[-1].role != "assistant":
        raise _ProblemError(f'the last message is of "{turns[-1].role}", expected "assistant": the answer to learn')
    return turns


def _turn(number: int, message: Any) -> Turn:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise _ProblemError(f'message {number}: found {_kind(message)}, expected {{"role": ..., "content": ...}}')
    role, content = message["role"], message["content"]
    if message.get("tool_calls"):
        raise _ProblemError(f"message {number}: found tool_calls, which cannot be learned yet: write them as content")
    if role not in ROLES:
        raise _ProblemError(f"message {number}: found the role {json.dumps(role)}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise _ProblemError(f"message {number}: found content that is not text, expected text alone")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise _ProblemError(f"message {number}: found {_kind(content)} as content, expected a string")
    if role == "assistant" and not content.strip():
        raise _ProblemError(f"message {number}: found an empty answer, expected text to learn")
    return Turn(role, _encodable(content, f"message {number}"))


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        found = "an empty string" if isinstance(value, str) else _kind(value)
        raise _ProblemError(f'"{key}": found {found}, expected text')
    return _encodable(value, f'"{key}"')


def _encodable(text: str, where: str) -> str:
    """Text that has an UTF-8 form: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _ProblemError(f"{where}: found half of a surrogate pair (character {error.start + 1})") from None
    return text


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
