"""Data files: what is read, and every way in which one can be broken, with its line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from perft.errors import InputError
from perft.training.data import Turn, read_examples

CHAT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}


def file(tmp_path: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def turns_of(path: Path) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in example.turns] for example in read_examples([path])]


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        {"prompt": "2+2", "completion": "4"},
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
        {"instruction": "2+2", "output": "4"},
        {"instruction": "2+2", "input": "", "output": "4", "answer": "4", "id": 7},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2"}]}, CHAT["messages"][1]]},
    ],
)
def test_formats(tmp_path: Path, record: Any) -> None:
    assert turns_of(file(tmp_path, lines(record))) == [[("user", "2+2"), ("assistant", "4")]]


def test_an_input_is_kept_for_the_alpaca_prompt(tmp_path: Path) -> None:
    (example,) = read_examples([file(tmp_path, lines({"instruction": "add", "input": "2 2", "output": "4"}))])
    assert example.turns[0] == Turn("user", "add\n\n2 2")
    assert (example.instruction, example.context) == ("add", "2 2")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(CHAT).encode(),
        lines(CHAT).replace("\n", "\r\n").encode(),
        b"\n\n" + lines(CHAT).encode() + b"\n  \n",
        json.dumps([CHAT], indent=2).encode(),
        lines(CHAT).rstrip().encode(),
    ],
    ids=["byte order mark", "Windows line ends", "blank lines", "a JSON list", "no line end"],
)
def test_what_does_no_harm(tmp_path: Path, content: bytes) -> None:
    assert turns_of(file(tmp_path, content)) == [[("user", "2+2"), ("assistant", "4")]]


def test_several_files_in_their_order(tmp_path: Path) -> None:
    first = file(tmp_path, lines({"prompt": "a", "completion": "1"}), "a.jsonl")
    second = file(tmp_path, json.dumps([{"prompt": "b", "completion": "2"}]), "b.json")
    assert [example.where for example in read_examples([first, second])] == [f"{first} line 1", f"{second} record 1"]


BROKEN: list[tuple[str | bytes, str]] = [
    ("", "found no record"),
    ("\n \n", "found no record"),
    ("[]", "found no record"),
    (lines(*[CHAT] * 6) + '{"prompt": \n', "line 7: found broken JSON"),
    ('{\n"prompt": "a",\n"completion": "b"\n}\n', "line 1: found broken JSON.*a record is one line"),
    ('[{"prompt": "a"', "found broken JSON"),
    (lines([1]), "record 1: found a number, expected an object"),
    (lines(1), "line 1: found a number, expected an object"),
    (lines({"instruction": "a"}), 'found the keys "instruction", expected'),
    (lines({"instruction": "a", "output": 4}), '"output": found a number'),
    (lines({"instruction": "a", "output": " "}), '"output": found an empty string'),
    (lines({"instruction": "a", "input": 3, "output": "b"}), '"input": found a number'),
    (lines({"messages": []}), '"messages": found an empty list'),
    (lines({"messages": "hello"}), '"messages": found a string'),
    (lines({"messages": [{"role": "human", "content": "a"}]}), 'message 1: found the role "human"'),
    (lines({"messages": [{"role": "user", "content": "a"}]}), 'the last message is of "user"'),
    (lines({"messages": [{"from": "gpt", "value": "a"}]}), "message 1: found an object, expected"),
    (lines({"messages": [{"role": "assistant", "content": ""}]}), "message 1: found an empty answer"),
    (lines({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}), "message 1: found content that is"),
    (lines({}), "found the keys no key"),
    ("ein Käse\n".encode("latin-1"), "line 1: found bytes that are no UTF-8"),
    (lines(CHAT).encode("utf-16"), "found text in UTF-16"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_examples([file(tmp_path, content)])


def test_every_problem_of_every_file_is_told(tmp_path: Path) -> None:
    files = [file(tmp_path, lines(CHAT, {}, 3), "a.jsonl"), file(tmp_path, "", "b.jsonl"), tmp_path / "none.jsonl"]
    with pytest.raises(InputError) as raised:
        read_examples(files)
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        f"{files[0]} line 2", f"{files[0]} line 3", str(files[1]), str(files[2]),
    ]  # fmt: skip


def test_a_thousand_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="and 980 more") as raised:
        read_examples([file(tmp_path, lines(*[{}] * 1000))])
    assert len(str(raised.value).splitlines()) == 22


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"instruction": "\\ud800", "output": "1"}', "half of a surrogate pair"),
        ('{"x": ' + "[" * 200_000, "nested too deeply"),
        ('{"instruction": "a", "output": "1", "output": "2"}', "the key 'output' is given twice"),
        ('{"instruction": "a", "output": "1", "prompt": "b", "completion": "2"}', "keys of several formats"),
        (
            '{"messages": [{"role": "assistant", "content": "b", "tool_calls": [1]}]}',
            "found tool_calls",
        ),
    ],
)  # fmt: skip
def test_a_record_that_means_something_else(tmp_path: Path, record: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_examples([file(tmp_path, record)])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="found no plain file, expected a file"):
        read_examples([tmp_path / "pipe"])
