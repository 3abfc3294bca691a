"""Owns how the demo's commands fail: one sentence on stderr and exit status 1, never a traceback."""

import sys
from collections.abc import Callable


class DemoError(Exception):
    """Something that the user can fix; the text is the sentence to show."""


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; returns the exit status. A DemoError is shown as its sentence, Ctrl-C as one word."""
    try:
        command()
    except DemoError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
