"""Owns how the demo's commands fail: one clear sentence on stderr and exit status 1, never a traceback."""

import sys
from collections.abc import Callable


class DemoError(Exception):
    """Something the person at the keyboard can mend; its text is the one sentence to show."""


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; the process's exit status. A DemoError becomes its sentence, Ctrl-C a short word."""
    try:
        command()
    except DemoError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
