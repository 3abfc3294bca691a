"""Owns how a command ends: its exit status, and one message on stderr in place of a traceback."""

import sys
from collections.abc import Callable

from perft.errors import InputError

INTERRUPTED = 130


def reported(command: str, work: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Do the work of `command`; 0, or 1 for what it refuses or the system cannot do, or 130 after Ctrl-C."""
    try:
        work()
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0
