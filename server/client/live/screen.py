"""Owns the terminal while a live view is on it: the alternate screen and the keys.

Invariant: however a view ends (a key, Ctrl-C, SIGTERM, an error), the terminal is as it was before it.
"""

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from server.client.live.polling import Poller, polling

REDRAW_S = 0.2
"""How often keys, the terminal's size and new data are looked for."""
ENTER, ESCAPE, BACKSPACE = "enter", "escape", "backspace"
_NAMED = {"\r": ENTER, "\n": ENTER, "\x1b": ESCAPE, "\x7f": BACKSPACE, "\x08": BACKSPACE}
NO_TERMINAL = "found no terminal on standard output (or TERM is dumb), expected one"
_READ_BYTES = 1024
INTERRUPTED = 130

Draw = Callable[[int, int], Sequence[Text]]
"""The lines of a view, for so many columns and lines of the terminal. Raises ClientError to end it."""


class Screen:
    """The whole terminal, as lines of text."""

    def __init__(self, console: Console, live: Live, keyboard: int | None) -> None:
        self._console, self._live, self._keyboard = console, live, keyboard

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal now."""
        return self._console.size.width, self._console.size.height

    def show(self, lines: Sequence[Text]) -> None:
        """Replace what is shown; lines that are too long, or too many, are cut off."""
        shown = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
        self.draw(shown)

    def draw(self, picture: RenderableType) -> None:
        """Replace what is shown by something else than lines."""
        self._live.update(picture, refresh=True)

    def pressed(self) -> list[str]:
        """The keys that were pressed, after at most REDRAW_S. An arrow or function key counts as nothing."""
        if self._keyboard is None:
            time.sleep(REDRAW_S)
            return []
        if not select.select([self._keyboard], [], [], REDRAW_S)[0]:
            return []
        typed = os.read(self._keyboard, _READ_BYTES).decode("utf-8", "replace")
        if not typed:  # hung up
            self._keyboard = None
        if typed.startswith("\x1b") and len(typed) > 1:
            return []
        return [_NAMED.get(key, key) for key in typed]


def is_terminal() -> bool:
    """Whether a live view can be shown on standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def run_view(draw: Draw, pollers: Sequence[Poller[Any]], pressed: Callable[[str], bool]) -> int:
    """Keep a view on the terminal until `pressed` says of a key that it ends it (0), or until Ctrl-C (130).

    Raises ClientError.
    """
    try:
        with full_screen() as screen, polling(pollers):
            drawn: object = None
            while True:
                state = (screen.size, [poller.answers for poller in pollers], int(time.time()))
                if state != drawn:
                    screen.show(draw(*screen.size))
                    drawn = state
                for key in screen.pressed():
                    if pressed(key):
                        return 0
                    drawn = None
                for poller in pollers:
                    if poller.defect is not None:
                        raise poller.defect
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def full_screen() -> Iterator[Screen]:
    """Take the terminal. Ctrl-C raises KeyboardInterrupt, SIGTERM SystemExit."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that does not know UTF-8
    console = Console(highlight=False, markup=False, emoji=False, legacy_windows=False)
    keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with _ended_by_sigterm(), _unbuffered(keyboard), live:
        yield Screen(console, live, keyboard)


@contextmanager
def _unbuffered(keyboard: int | None) -> Iterator[None]:
    """Keys arrive one by one and are not echoed; Ctrl-Z, which would leave the view on the shell's screen, is off."""
    if keyboard is None:
        yield
        return
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        changed = termios.tcgetattr(keyboard)
        changed[6][termios.VSUSP] = b"\x00"
        termios.tcsetattr(keyboard, termios.TCSANOW, changed)
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
