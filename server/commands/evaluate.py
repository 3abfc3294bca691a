"""Owns the command `perft eval`: test questions to the models of a running server, scores with intervals.

Invariant: exit 0 means every question was answered by every model, 1 that one was not (the reason is on stderr), 2
wrong usage. What was answered before a failure or Ctrl-C is shown and written.
"""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perft.errors import InputError
from server.client.arguments import DEFAULT_SERVER, key_problem, server_url
from server.commands.report import reported
from server.evaluation.asking import Answered, Asking, ask_all, look
from server.evaluation.connection import Server
from server.evaluation.output import Output
from server.evaluation.results import ModelRun, as_json, table, unfinished_lines
from server.evaluation.tasks import TASKS, Question, Task, check_answers, read_questions, task_named, task_of

AT_ONCE = 32


def run(arguments: list[str]) -> int:
    """Run `perft eval ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if problem := _usage_problem(given):
        parser.error(problem)
    server = Server(given.server.rstrip("/").removesuffix("/v1"), given.key)
    reads = [*given.files, *(Path(each) for each in (given.include, given.tokenizer) if each is not None)]

    def work() -> None:
        output = None if given.output is None else Output(given.output, reads, given.overwrite)
        if given.harness:
            _harness(server, given, output)
        else:
            _files(server, given, output)

    return reported("perft eval", work)


def _usage_problem(given: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    if not given.files and not given.harness:
        return "give files of questions, or --harness TASK"
    if given.files and given.harness:
        return f"found files ({given.files[0]}) and --harness, expected one of the two"
    for flag, value, is_of_harness in (
        ("--task", given.task, False), ("--max-tokens", given.max_tokens, False),
        ("--template alpaca", given.template == "alpaca", False), ("--tokenizer", given.tokenizer, True),
        ("--chat", given.chat, True), ("--include", given.include, True),
    ):  # fmt: skip
        if value and is_of_harness != bool(given.harness):
            return f"{flag}: it belongs to {'--harness' if is_of_harness else 'files of questions'}"
    twice = [model for model in given.model if given.model.count(model) > 1]
    if twice:
        return f"--model: found {twice[0]!r} more than once, expected each model once"
    if given.overwrite and given.output is None:
        return "--overwrite: it belongs to --output FILE"
    return key_problem(given.key)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perft eval",
        description="Ask test questions of a running server's models. FILES are in LLM-Adapters' layout, a JSON list "
        'of {"instruction", "input", "answer"}, of one of the PERFT paper\'s tasks each; --harness runs tasks of '
        "lm-evaluation-harness instead.",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--model", action="append", type=_model, required=True, metavar="NAME", help="base or adapter; repeatable"
    )
    parser.add_argument("--server", type=server_url, default=os.environ.get("PERFT_SERVER") or DEFAULT_SERVER,
                        metavar="URL", help=f"default: PERFT_SERVER, or {DEFAULT_SERVER}")  # fmt: skip
    parser.add_argument("--key", default=os.environ.get("PERFT_API_KEY") or None, metavar="KEY",
                        help="an inference key; prefer PERFT_API_KEY, which other users cannot see")  # fmt: skip
    parser.add_argument("--task", type=_task, metavar="NAME", help="how FILES are judged (default: by their names)")
    parser.add_argument("--template", choices=["chat", "alpaca"], default="chat", help="the prompt (default: chat)")
    parser.add_argument("--max-tokens", type=_at_least_one, metavar="N", help="of an answer (default: by task)")
    parser.add_argument("--limit", type=_at_least_one, metavar="N", help="questions of each file")
    parser.add_argument(
        "--at-once", type=_at_least_one, default=AT_ONCE, metavar="N", help="requests at a time (default: 32)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results, with every answer, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--harness", nargs="+", metavar="TASK", help="its tasks")
    harness.add_argument("--tokenizer", metavar="MODEL", help="the base's folder or name, for its tokenizer")
    harness.add_argument("--chat", action="store_true", help="ask as a chat: for tasks that generate")
    harness.add_argument("--include", type=Path, metavar="FOLDER", help="tasks of your own, as YAML")
    return parser


def _at_least_one(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 1")
    return int(text)


def _model(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a model's name")
    return text


def _task(text: str) -> str:
    if task_named(text) is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(TASKS)}")
    return text


def _files(server: Server, given: argparse.Namespace, output: Output | None) -> None:
    runs = [
        ModelRun(model, task, questions[: given.limit])
        for task, questions in _test_sets(given.files, given.task)
        for model in given.model
    ]
    asyncio.run(look(server, given.model))
    try:
        for each in runs:
            asyncio.run(_ask(server, each, given))
    finally:
        if any(each.answers for each in runs):
            _report(runs, output)


def _test_sets(files: Sequence[Path], named: str | None) -> list[tuple[Task, list[Question]]]:
    """The questions of each file, and how they are judged. Raises InputError."""
    sets: list[tuple[Task, list[Question]]] = []
    for file in files:
        task = task_of(file, named)
        if any(task is other for other, _ in sets):
            raise InputError(f"{file}: found a second file of {task.name}, expected one file for each task")
        questions = read_questions(file)
        check_answers(file, task, questions)
        sets.append((task, questions))
    return sets


async def _ask(server: Server, asked: ModelRun, given: argparse.Namespace) -> None:
    from tqdm import tqdm

    name = f"{asked.task.name}, {asked.model}"
    with tqdm(total=len(asked.questions), desc=name, disable=not sys.stderr.isatty()) as bar:

        def say(line: str) -> None:
            bar.write(f"perft eval: {name}: {line}", file=sys.stderr)

        def keep(index: int, answer: Answered) -> None:
            asked.answers[index] = answer
            bar.update()

        how = Asking(given.template, given.max_tokens or asked.task.max_tokens, given.at_once, say)
        await ask_all(server, asked.model, asked.questions, how, keep)


def _report(runs: Sequence[ModelRun], output: Output | None) -> None:
    """Show and write what was answered; a file that cannot be written after all does not keep it from being shown."""
    try:
        if output is not None:
            output.write(as_json(runs))
    finally:
        if scores := [each.score() for each in runs if each.is_complete]:
            print(table(scores))
        for line in unfinished_lines(runs):
            print(f"perft eval: {line}", file=sys.stderr)


def _harness(server: Server, given: argparse.Namespace, output: Output | None) -> None:
    from server.evaluation.harness import run_harness

    if given.tokenizer is None:
        raise InputError("--harness needs --tokenizer MODEL: the harness counts tokens by itself")
    asyncio.run(look(server, given.model))
    results: dict[str, Any] = {}
    try:
        for model in given.model:
            results[model] = run_harness(
                server, model, given.harness, given.tokenizer, given.chat, given.at_once, given.limit, given.include
            )
            _print_metrics(model, results[model])
    finally:
        if output is not None and results:
            output.write(results)


def _print_metrics(model: str, tasks: dict[str, Any]) -> None:
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in metric:
                error = metrics.get(metric.replace(",", "_stderr,"))
                spread = f" +- {1.96 * error:.4f}" if isinstance(error, float) else ""
                print(f"{task}  {model}  {metric.partition(',')[0]}  {value:.4f}{spread}")
