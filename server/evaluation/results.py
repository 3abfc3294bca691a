"""Owns what an evaluation found: scores of test sets that were answered in full, and how far the others came.

Invariant: a question without an answer counts nowhere.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from perft.reading import printable
from server.evaluation.asking import Answered
from server.evaluation.tasks import Question, Task, interval


@dataclass(frozen=True)
class Score:
    """One model at one test set. model: as asked; answered_by: as the server names what answered."""

    model: str
    answered_by: list[str]
    task: str
    right: int
    asked: int

    def as_json(self) -> dict[str, Any]:
        low, high = interval(self.right, self.asked)
        return {**asdict(self), "accuracy": self.right / self.asked, "interval_95": [low, high]}


@dataclass
class ModelRun:
    """One model's answers to a test set, by the questions' index, as they come."""

    model: str
    task: Task
    questions: Sequence[Question]
    answers: dict[int, Answered] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.answers) == len(self.questions)

    def score(self) -> Score:
        """The score of a complete set."""
        right = sum(each["right"] for each in self.judged())
        names = sorted({printable(each.model) for each in self.answers.values()})
        return Score(self.model, names, self.task.name, right, len(self.questions))

    def judged(self) -> list[dict[str, Any]]:
        """The questions that were answered, in their order."""
        pairs = [(self.questions[index], answer.text) for index, answer in sorted(self.answers.items())]
        return [
            {"instruction": question.instruction, "expected": question.answer, "answer": text,
             "right": self.task.is_right(text, question.answer)}
            for question, text in pairs
        ]  # fmt: skip

    def progress(self) -> dict[str, Any]:
        return {"model": self.model, "task": self.task.name, "answered": len(self.answers), "of": len(self.questions)}


def as_json(runs: Sequence[ModelRun]) -> dict[str, Any]:
    """Everything that was found. unfinished: sets that stopped half-way, which have answers and no score."""
    return {
        "scores": [each.score().as_json() for each in runs if each.is_complete],
        "unfinished": [each.progress() for each in runs if not each.is_complete],
        "answers": {f"{each.task.name}, {each.model}": each.judged() for each in runs if each.answers},
    }


def unfinished_lines(runs: Sequence[ModelRun]) -> list[str]:
    """A line for each set that stopped half-way."""
    return [
        f"{each.task.name}, {each.model}: no score, {len(each.answers)} of {len(each.questions)} questions answered"
        for each in runs
        if not each.is_complete
    ]


def table(scores: Sequence[Score]) -> str:
    """The scores for a terminal."""
    rows = [("task", "model", "right", "accuracy", "95 %")]
    for score in scores:
        low, high = interval(score.right, score.asked)
        share = f"{score.right / score.asked:.1%}"
        name = ", ".join(score.answered_by)
        rows.append((score.task, name, f"{score.right}/{score.asked}", share, f"{low:.1%} to {high:.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
