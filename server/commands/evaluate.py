"""Owns the command `perft eval`: test questions to the models of a running server, scores with intervals.

Invariant: exit 0 means every question was answered by every model, 1 that one was not (the reason is on stderr), 2
wrong usage.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perft.errors import InputError
from server.client.arguments import DEFAULT_SERVER, server_url
from server.commands.report import reported
from server.evaluation.asking import Answered, Server, ask_all
from server.evaluation.tasks import Task, interval, read_questions, task_of

AT_ONCE = 32


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
        return {**self.__dict__, "accuracy": self.right / self.asked, "interval_95": [low, high]}


def run(arguments: list[str]) -> int:
    """Run `perft eval ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not given.files and not given.harness:
        parser.error("give files of questions, or --harness TASK")
    server = Server(given.server.rstrip("/").removesuffix("/v1"), given.key)

    def work() -> None:
        results = _harness(server, given) if given.harness else _files(server, given)
        if given.output is not None:
            given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    return reported("perft eval", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perft eval",
        description="Ask test questions of a running server's models. FILES are in LLM-Adapters' layout, a JSON list "
        'of {"instruction", "input", "answer"}, of one of the PERFT paper\'s tasks each; --harness runs tasks of '
        "lm-evaluation-harness instead.",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--model", action="append", required=True, metavar="NAME", help="base or adapter; repeatable")
    parser.add_argument("--server", type=server_url, default=os.environ.get("PERFT_SERVER") or DEFAULT_SERVER,
                        metavar="URL", help=f"default: PERFT_SERVER, or {DEFAULT_SERVER}")  # fmt: skip
    parser.add_argument("--key", default=os.environ.get("PERFT_API_KEY") or None, metavar="KEY",
                        help="an inference key; prefer PERFT_API_KEY, which other users cannot see")  # fmt: skip
    parser.add_argument("--task", metavar="NAME", help="how FILES are judged (default: by their names)")
    parser.add_argument("--template", choices=["chat", "alpaca"], default="chat", help="the prompt (default: chat)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: by task)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each file")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="N", help="requests at a time (default: 32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results, with every answer, as JSON")
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--harness", nargs="+", metavar="TASK", help="its tasks")
    harness.add_argument("--tokenizer", metavar="MODEL", help="the base's folder or name, for its tokenizer")
    harness.add_argument("--chat", action="store_true", help="ask as a chat: for tasks that generate")
    harness.add_argument("--include", type=Path, metavar="FOLDER", help="tasks of your own, as YAML")
    return parser


def _files(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    sets = [(task_of(file, given.task), read_questions(file)[: given.limit]) for file in given.files]
    scores: list[Score] = []
    answers: dict[str, list[dict[str, Any]]] = {}
    for task, questions in sets:
        for model in given.model:
            found = asyncio.run(_asked(server, model, task, questions, given))
            judged = [task.is_right(each.text, q.answer) for each, q in zip(found, questions, strict=True)]
            names = sorted({each.model for each in found})
            scores.append(Score(model, names, task.name, sum(judged), len(judged)))
            answers[f"{task.name}, {model}"] = [
                {"instruction": q.instruction, "expected": q.answer, "answer": each.text, "right": right}
                for q, each, right in zip(questions, found, judged, strict=True)
            ]
    print(_table(scores))
    return {"scores": [score.as_json() for score in scores], "answers": answers}


async def _asked(
    server: Server, model: str, task: Task, questions: Sequence[Any], given: argparse.Namespace
) -> list[Answered]:
    from tqdm import tqdm

    tokens = given.max_tokens or task.max_tokens
    with tqdm(total=len(questions), desc=f"{task.name}, {model}", disable=not sys.stderr.isatty()) as bar:
        try:
            return await ask_all(server, model, questions, given.template, tokens, given.at_once, bar.update)
        except* InputError as group:
            error = group.exceptions[0]
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            problem = error
    raise problem


def _table(scores: Sequence[Score]) -> str:
    rows = [("task", "model", "right", "accuracy", "95 %")]
    for score in scores:
        low, high = interval(score.right, score.asked)
        share = f"{score.right / score.asked:.1%}"
        name = ", ".join(score.answered_by) or score.model
        rows.append((score.task, name, f"{score.right}/{score.asked}", share, f"{low:.1%} to {high:.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _harness(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    from server.evaluation.harness import run_harness

    if given.tokenizer is None:
        raise InputError("--harness needs --tokenizer MODEL: the harness counts tokens by itself")
    results: dict[str, Any] = {}
    for model in given.model:
        results[model] = run_harness(
            server, model, given.harness, given.tokenizer, given.chat, given.at_once, given.limit, given.include
        )
        for task, metrics in results[model].items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "_stderr" not in metric:
                    error = metrics.get(metric.replace(",", "_stderr,"))
                    spread = f" +- {1.96 * error:.4f}" if isinstance(error, float) else ""
                    print(f"{task}  {model}  {metric.partition(',')[0]}  {value:.4f}{spread}")
    return results
