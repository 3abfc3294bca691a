"""Owns a conversation: what each model has been told and has answered, and one turn of it.

Invariant: every model has its own history; a question that was not answered is in none.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
from rich.console import Console

from server.client.chat.asking import Answer, Message, Wanted, ask
from server.client.chat.view import columns, error_line, fits_side_by_side, name_of, note, plain
from server.client.connection import Server
from server.client.live.screen import full_screen, is_terminal
from server.client.text import printable_lines

REDRAW_S = 0.1


@dataclass
class Conversation:
    """With some models of a server at once."""

    server: Server
    models: Sequence[str]
    wanted: Wanted
    system: str | None = None
    _histories: list[list[Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's text."""
        begin = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._histories = [list(begin) for _ in self.models]

    def turn(self, prompt: str) -> list[Answer]:
        """Ask all models and show their answers, also those that Ctrl-C cut off; then raises KeyboardInterrupt."""
        answers = [Answer(model) for model in self.models]
        asked: list[list[Message]] = [[*history, {"role": "user", "content": prompt}] for history in self._histories]
        try:
            self._show(answers, asked)
        finally:
            for history, question, answer in zip(self._histories, asked, answers, strict=True):
                if answer.text:
                    history[:] = [*question, {"role": "assistant", "content": answer.text}]
        return answers

    def _show(self, answers: list[Answer], asked: list[list[Message]]) -> None:
        if len(answers) == 1:
            self._show_one(answers[0], asked)
        elif is_terminal():
            self._show_beside(answers, asked)
        else:
            try:
                self._run(answers, asked, lambda: None)
            finally:
                print(plain(answers), flush=True)

    def _show_one(self, answer: Answer, asked: list[list[Message]]) -> None:
        """The text alone on standard output, as it comes; what there is to say about it on standard error."""
        written = 0

        def show() -> None:
            nonlocal written
            new, written = answer.text[written:], len(answer.text)
            if new:
                print(printable_lines(new), end="", flush=True)

        try:
            self._run([answer], asked, show)
        finally:
            if answer.text:
                print(flush=True)
            if answer.error is not None:
                print(f"perft chat: {name_of(answer)}: {error_line(answer.error)}", file=sys.stderr)
            if numbers := note(answer):
                print(f"-- {name_of(answer)}: {numbers}", file=sys.stderr)

    def _show_beside(self, answers: list[Answer], asked: list[list[Message]]) -> None:
        """While they come on a screen of their own, which takes any size of the terminal; then below the prompt."""
        console = Console(highlight=False, markup=False, emoji=False)
        try:
            with full_screen() as screen:
                self._run(answers, asked, lambda: screen.draw(columns(answers, console, console.height)))
        finally:
            if fits_side_by_side(len(answers), console.width):
                console.print(columns(answers, console))
            else:
                print(plain(answers), flush=True)

    def _run(self, answers: list[Answer], asked: list[list[Message]], show: Callable[[], None]) -> None:
        """Ask all at once, and show what there is until the last has ended."""
        asyncio.run(self._ask(answers, asked, show))

    async def _ask(self, answers: list[Answer], asked: list[list[Message]], show: Callable[[], None]) -> None:
        async with self.server.open(httpx.AsyncClient) as http:
            tasks = [
                asyncio.create_task(ask(http, self.server, question, self.wanted, answer))
                for question, answer in zip(asked, answers, strict=True)
            ]
            try:
                pending = set(tasks)
                while pending:
                    pending = (await asyncio.wait(pending, timeout=REDRAW_S))[1]
                    show()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.result()
