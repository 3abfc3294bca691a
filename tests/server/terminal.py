"""A command on a pseudo-terminal, as a person has it: what is on its screen, keys, its size, how it leaves it."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.server.processes import LIMIT_S, wait_until

ENTER_SCREEN, LEAVE_SCREEN, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"
_HOME, _STYLE = "\x1b[H", re.compile(r"\x1b\[[0-9;]*m")
_PROGRAM = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C and a new size reach it
from server.cli import main
main()
"""
_ALLOWED = re.compile(r"\x1b\[(\?1049[hl]|\?25[hl]|H|2J|[0-9;]*m|[0-9]*[AK]|2K|1A)")
"""What rich itself writes."""


class Terminal:
    """`perft ARGUMENTS` on a terminal of so many columns and lines."""

    def __init__(self, arguments: Sequence[str], columns: int, lines: int, environment: dict[str, str]) -> None:
        self.master, slave = os.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        variables = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=variables, start_new_session=True,
        )  # fmt: skip
        self._slave, self.raw = slave, ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                block = os.read(self.master, 65536)
            except OSError:
                return
            if not block:
                return
            self.raw += block.decode("utf-8", "replace")

    @property
    def text(self) -> str:
        """All that it wrote, without colours."""
        return _STYLE.sub("", self.raw)

    @property
    def screen(self) -> list[str]:
        """The lines of the last whole picture of a live view; of other output, all of it."""
        pictures = self.raw.split(_HOME)
        whole = pictures[-2] if len(pictures) > 2 and LEAVE_SCREEN not in self.raw else pictures[-1]
        return [line.rstrip() for line in _STYLE.sub("", whole).replace("\r", "").split("\n")]

    def wait_for(self, text: str) -> list[str]:
        """Until a text is on the screen; then its lines."""
        return self.wait_until(lambda lines: any(text in line for line in lines))

    def wait_until(self, is_so: Callable[[list[str]], bool]) -> list[str]:
        """Until something is so of the screen; then its lines."""
        wait_until(lambda: is_so(self.screen) or self.process.poll() is not None)
        assert is_so(self.screen), self.raw
        return self.screen

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait(self) -> int:
        """The exit status; what it wrote is whole then."""
        status = self.process.wait(LIMIT_S)
        assert termios.tcgetattr(self._slave) == self.before, "the terminal is not as it was"
        os.close(self._slave)
        self._reader.join(LIMIT_S)
        return status

    def assert_clean(self) -> None:
        """It left the alternate screen, shows its cursor, and nothing but rich has written escape sequences."""
        assert self.raw.count(ENTER_SCREEN) == self.raw.count(LEAVE_SCREEN)
        assert self.raw.rfind(SHOW_CURSOR) > self.raw.rfind("\x1b[?25l") or "\x1b[?25l" not in self.raw
        assert_harmless(self.raw)


def assert_harmless(raw: str) -> None:
    """No control character or escape sequence is in an output but those of colours and of the live view."""
    left = _ALLOWED.sub("", raw)
    found = sorted({character for character in left if not character.isprintable() and character not in "\r\n\t"})
    assert not found, found


@contextmanager
def on_terminal(*arguments: str, columns: int = 120, lines: int = 30, **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(arguments, columns, lines, environment)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.master)
