"""Owns engines in processes of their own, for what one process cannot show: other environments, several engines.

Each is a `BenchEngine` that does what it is asked, one thing at a time, and sleeps in between.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common.engine import BenchEngine, Segment

START_LIMIT_S = 300.0
PAUSE_S = 0.5
"""Before each segment: OpenMP threads of another engine spin for a while after their last product."""


class RemoteEngine:
    """An engine in another process. `ask` starts a segment, `answer` waits for it; `decode` is both."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ask(self, adapters: Sequence[int | None], steps: int) -> None:
        self._connection.send((list(adapters), steps))

    def answer(self) -> Segment:
        """Raises RuntimeError, with the other side's traceback, if it failed; EOFError if it died."""
        found: Segment | str = self._connection.recv()
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def decode(self, adapters: Sequence[int | None], steps: int) -> Segment:
        self.ask(adapters, steps)
        return self.answer()


@contextmanager
def remote_engine(
    base: Path,
    pool_rows: int | None,
    folders: Sequence[Path] = (),
    options: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[RemoteEngine]:
    """An engine of its own process, started when this returns. pool_rows: None for an engine without LoRA."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, base, pool_rows, list(folders), options or {})
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments)
    with _changed(environment or {}):
        process.start()
    theirs.close()
    try:
        if not ours.poll(START_LIMIT_S):
            raise TimeoutError(f"an engine did not start within {START_LIMIT_S:.0f} s")
        engine = RemoteEngine(ours)
        engine.answer()
        yield engine
    finally:
        ours.close()
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, base: Path, pool_rows: int | None, folders: list[Path], options: Any) -> None:
    """Answer until the other side closes the connection."""
    try:
        if pool_rows is None:
            engine = BenchEngine.start_plain(base, **options)
        else:
            engine = BenchEngine.start(base, pool_rows, **options)
            engine.load(folders)
        connection.send(Segment([], []))
        while True:
            adapters, steps = connection.recv()
            time.sleep(PAUSE_S)
            connection.send(engine.decode(adapters, steps))
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())


@contextmanager
def _changed(environment: dict[str, str]) -> Iterator[None]:
    """os.environ with changes, which a process that is started meanwhile inherits."""
    saved = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
