"""Owns how a command ends: its exit status, and one message on stderr in place of a traceback."""

import sys
from collections.abc import Callable

from perft.errors import InputError
from perft.reading import printable

INTERRUPTED = 130


def reported(command: str, work: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Do the work of `command`; 0, or 1 for what it refuses or the system cannot do, or 130 after Ctrl-C."""
    try:
        work()
    except InputError as error:
        _complain(command, str(error))
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(command, f"{where}{error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print(f"{command}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _complain(command: str, message: str) -> None:
    """Names and values in it may come from somebody's file."""
    lines = f"{command}: {message}".split("\n")
    print("\n".join(map(printable, lines)), file=sys.stderr)
