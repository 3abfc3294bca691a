"""Owns the progress bar of bytes that are sent or received: on a terminal, on standard error, gone when it is done.

Invariant: where standard error is no terminal nothing is written.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from perft.reading import printable


@contextmanager
def progress(what: str, total: int, then: str = "") -> Iterator[Callable[[int], object]]:
    """A function that takes the bytes of each block. total: of all. then: what is waited for after the last one."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what), total=total)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            is_whole = bool(then) and done >= total
            bar.update(task, completed=min(done, total), description=f"{printable(what)}: {then}" if is_whole else None)

        yield count
