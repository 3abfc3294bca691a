"""Owns the paper's test sets in LLM-Adapters' layout, and how an answer is judged.

A file is a JSON list of {"instruction": ..., "input": ..., "output": ..., "answer": ...}. Its task is told by its
folder or name (`boolq/test.json`, `gsm8k.json`). Commonsense: the first match of the task's pattern in the answer;
arithmetic: the last number in it, right within 0.001; AQuA: the first letter A to E (docs/method.md, "Loss and
training").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from perft.errors import InputError
from perft.reading import printable, read_json

TOLERANCE = 0.001
QUESTION_BYTES = 256 * 1024 * 1024
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@dataclass(frozen=True)
class Task:
    """How one test set is judged. kind: "commonsense" or "arithmetic". max_tokens: of an answer, as in the paper."""

    name: str
    kind: str
    is_right: Callable[[str, str], bool]
    max_tokens: int


@dataclass(frozen=True)
class Question:
    """One question of a test set."""

    instruction: str
    context: str
    answer: str


def _first_match(pattern: str) -> Callable[[str, str], bool]:
    compiled = re.compile(pattern)

    def is_right(text: str, answer: str) -> bool:
        found = compiled.search(text.lower())
        return found is not None and found[0] == answer.strip().lower()

    return is_right


def last_number(text: str) -> float | None:
    """The last number in a text; thousands may be set apart by commas."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").rstrip(".")) if found else None


def _same_number(text: str, answer: str) -> bool:
    found, expected = last_number(text), last_number(answer)
    return found is not None and expected is not None and abs(found - expected) <= TOLERANCE


def _same_letter(text: str, answer: str) -> bool:
    found = re.search(r"\b[A-E]\b", text) or re.search(r"[A-E]", text)
    return found is not None and found[0] == answer.strip()[:1].upper()


_COMMONSENSE = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_i_qa": r"answer[1-5]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
    "arc-easy": r"answer[1-5]",
    "arc-challenge": r"answer[1-5]",
    "openbookqa": r"answer[1-5]",
}
_ARITHMETIC = ("multiarith", "gsm8k", "addsub", "singleeq", "svamp")
_OTHER_NAMES = {"siqa": "social_i_qa", "arc-e": "arc-easy", "arc-c": "arc-challenge", "obqa": "openbookqa"}
COMMONSENSE_TOKENS, ARITHMETIC_TOKENS = 32, 256
"""The paper generates 4 tokens for commonsense, of tokenizers in which an answer is that short; a chat model needs a
few words before it."""

TASKS: dict[str, Task] = {
    **{
        name: Task(name, "commonsense", _first_match(pattern), COMMONSENSE_TOKENS)
        for name, pattern in _COMMONSENSE.items()
    },
    **{name: Task(name, "arithmetic", _same_number, ARITHMETIC_TOKENS) for name in _ARITHMETIC},
    "aqua": Task("aqua", "arithmetic", _same_letter, ARITHMETIC_TOKENS),
}


def task_named(name: str) -> Task | None:
    """The task of this name, in one of the ways that it is written."""
    plain = name.lower().replace("_test", "").removesuffix("-test")
    return TASKS.get(_OTHER_NAMES.get(plain, plain))


def task_of(file: Path, named: str | None) -> Task:
    """The task of a file. Raises InputError if its name says none, and `named` does not."""
    for name in [named] if named is not None else [file.stem, file.parent.name]:
        if (task := task_named(name)) is not None:
            return task
    raise InputError(f"{file}: found no task in its name, expected one of {', '.join(TASKS)}: give it with --task")


def read_questions(file: Path) -> list[Question]:
    """The questions of a file. Raises InputError with every problem."""
    records = read_json(file, QUESTION_BYTES)
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: found no list of questions")
    _refuse(file, [_problem(record) for record in records])
    return [Question(each["instruction"], each.get("input") or "", _text(each["answer"])) for each in records]


def check_answers(file: Path, task: Task, questions: Sequence[Question]) -> None:
    """Raises InputError for expected answers that no text can match: an empty one, or NaN for a number."""
    _refuse(file, [
        None if task.is_right(each.answer.upper(), each.answer)  # an answer has to be right by its own measure
        else f"found the answer {printable(each.answer)!r}, which {task.name} cannot judge"
        for each in questions
    ])  # fmt: skip


def _refuse(file: Path, problems: Sequence[str | None]) -> None:
    """problems: one for each record, or None."""
    found = [f"{file} record {number}: {problem}" for number, problem in enumerate(problems, start=1) if problem]
    if found:
        raise InputError("the questions cannot be read", found)


def _text(answer: str | int | float) -> str:
    """An expected answer as text, a number without an exponent."""
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)


def _problem(record: object) -> str | None:
    if not isinstance(record, dict):
        return "found no object"
    wanted = {"instruction": str, "answer": str | int | float}
    lacking = [key for key, kind in wanted.items() if not isinstance(record.get(key), kind)]
    if lacking:
        return f"found no {' and no '.join(lacking)}"
    if not record["instruction"].strip():
        return "found an empty instruction"
    if not isinstance(record.get("input"), str | None):
        return "found an input that is no text"
    texts = (record["instruction"], record.get("input") or "", str(record["answer"]))
    return None if all(_is_unicode(text) for text in texts) else "found half of a surrogate pair, which is no text"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, J. Amer. Statist. Assoc. 22, 1927)."""
    if asked == 0:
        return 0.0, 1.0
    share, spread = right / asked, z * z / asked
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / asked + spread / (4 * asked)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)
