"""Owns how answers are shown: side by side on a terminal, one after the other elsewhere.

Invariant: what a server or a model wrote is shown as text: printable, and never read as markup.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perft.reading import printable
from server.client.chat.asking import Answer
from server.client.chat.parting import parting
from server.client.connection import ClientError
from server.client.live.rows import number, seconds
from server.client.text import printable_lines

NARROWEST = 24
"""Columns of the terminal that an answer beside others takes at least; with fewer they stand one below the other."""
LINES_AROUND = 9
"""Of a table: its heading, rules and notes."""
CUT = {"length": "cut off at its longest"}


def name_of(answer: Answer) -> str:
    """The model that answered, as the server names it; before that the one that was asked for."""
    return printable(answer.model or answer.asked)


def note(answer: Answer, first: Answer | None = None) -> str:
    """The numbers of an answer, how it ended, and where it parts from the first one."""
    if not answer.is_done:
        return "..." if answer.first is None else f"first token {seconds(answer.seconds_to_first)}"
    parts = []
    if answer.first is not None:
        parts.append(f"first token {seconds(answer.seconds_to_first)}")
    if answer.tokens_per_second is not None:
        parts.append(f"{number(answer.tokens_per_second)} tokens/s")
    if answer.tokens is not None:
        parts.append(f"{answer.tokens:,} tokens")
    if answer.has_hidden:
        parts.append("its reasoning is not shown")
    if answer.finish_reason not in ("", "stop"):
        parts.append(CUT.get(answer.finish_reason, printable(answer.finish_reason)))
    if first is not None and first is not answer and first.is_done and first.text and answer.text:
        parts.append(_parts_at(first, answer))
    return ", ".join(parts)


def error_line(error: ClientError) -> str:
    return printable(f"{error.code}: {error}" if error.code else str(error))


def plain(answers: Sequence[Answer]) -> str:
    """The answers one after the other, each between a line with its model and one with its numbers."""
    blocks = []
    for answer in answers:
        lines = [f"== {name_of(answer)} =="]
        if answer.text:
            lines.append(printable_lines(answer.text))
        if answer.error is not None:
            lines.append(f"error: {error_line(answer.error)}")
        if numbers := note(answer, answers[0]):
            lines.append(f"-- {numbers}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def columns(answers: Sequence[Answer], console: Console, most_lines: int | None = None) -> Table:
    """The answers side by side. most_lines: of the terminal; then only the end of longer answers is shown."""
    table = Table(box=box.MINIMAL, expand=True, show_footer=True, pad_edge=False, padding=(0, 1))
    width = max(1, console.width // len(answers) - 4)
    bodies = []
    for answer in answers:
        style = "bold" if answer.error is None else "bold red"
        table.add_column(Text(name_of(answer), style), Text(note(answer, answers[0]), "dim"), ratio=1, overflow="fold")
        body = _body(answers[0], answer)
        if most_lines is not None:
            kept = body.wrap(console, width)[-max(1, most_lines - LINES_AROUND) :]
            body = Text("\n").join(kept)
        bodies.append(body)
    table.add_row(*bodies)
    return table


def fits_side_by_side(answers: int, width: int) -> bool:
    return width // answers >= NARROWEST


def _body(first: Answer, answer: Answer) -> Text:
    """An answer's text, with the word marked in which it parts from the first one, and its error."""
    shown = printable_lines(answer.text)
    body = Text(shown)
    where = parting(printable_lines(first.text), shown, first.is_done and answer.is_done)
    if where is not None and first is not answer and first.text:
        word = shown[where:].split(maxsplit=1)
        body.stylize("reverse", where, where + len(word[0]) if word else where)
    if answer.error is not None:
        body.append(f"{chr(10) if shown else ''}error: {error_line(answer.error)}", "red")
    return body


def _parts_at(first: Answer, answer: Answer) -> str:
    where = parting(first.text, answer.text, True)
    if where is None:
        return f"the same as {name_of(first)}"
    words = answer.text[where:].split(maxsplit=1)
    at = f": {printable(words[0])}" if words else ", where it ends"
    return f"parts from {name_of(first)} at word {len(answer.text[:where].split()) + 1}{at}"
