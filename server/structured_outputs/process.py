"""Owns the compile process from the server's side: starting it, asking it, starting it again, ending it.

Invariant: whoever asks gets a verdict or EngineUnavailableError; a spec whose caller left is not compiled on.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import EngineUnavailableError
from server.structured_outputs.spec import Spec
from server.structured_outputs.wire import LENGTH_BYTES, Verdict, frame, message_of, verdict_of

START_TIMEOUT_S = 180.0
"""Seconds for which a caller waits for a process that loads."""
MAX_PAUSE_S = 30.0
"""Seconds between two starts of a process that keeps failing; at first a half."""
WALL_PER_CPU = 20.0
"""Wall seconds for each CPU second that a compile may take, at least MIN_WALL_S: the machine may be busy."""
MIN_WALL_S = 30.0
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""No device, no threads of its own, and no arenas that reserve address space."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiler:
    """What the process runs: `module:function`, called once with `argument`, makes a child.Job."""

    job: str
    argument: bytes = b""


class _ProcessEndedError(Exception):
    """The process ended before it answered."""


class CompilerProcess:
    """The process. memory_bytes: what one compile may take beside what the process has loaded."""

    def __init__(self, compiler: Compiler, memory_bytes: int) -> None:
        self._compiler, self._memory_bytes = compiler, memory_bytes
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Verdict]] = {}
        self._ready = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self.pid: int | None = None

    def start(self) -> None:
        """Begin to load it, in the background."""
        self._task = asyncio.get_running_loop().create_task(self._keep_running())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def compile(self, spec: Spec, cpu_s: float) -> Verdict:
        """Try a spec, in `cpu_s` seconds of CPU time. Raises EngineUnavailableError."""
        for _ in range(2):  # once more if the process ended under it: its forks crash, not it
            try:
                return await self._ask(spec, cpu_s)
            except _ProcessEndedError:
                continue
        raise EngineUnavailableError("the process that compiles structured outputs ended; retry in a few seconds")

    async def _ask(self, spec: Spec, cpu_s: float) -> Verdict:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            message = "the process that compiles structured outputs does not start; see the server log"
            raise EngineUnavailableError(message, retry_after_s=30) from None
        number = next(self._numbers)
        asked: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        limits = {
            "cpu_s": cpu_s, "wall_s": max(cpu_s * WALL_PER_CPU, MIN_WALL_S), "memory_bytes": self._memory_bytes
        }  # fmt: skip
        try:
            self._send({"number": number, "spec": {spec.kind: spec.value}, "stop_tokens": spec.stop_tokens, **limits})
            return await asked
        except asyncio.CancelledError:
            self._send({"number": number, "cancel": True})
            raise
        finally:
            self._asked.pop(number, None)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(frame(dict(message)))

    async def _keep_running(self) -> None:
        """Start the process, again whenever it ends."""
        pause_s = 0.5
        while True:
            answered = False
            try:
                async for message in self._run_once():
                    answered = True
                    self._take(message)
            except (OSError, asyncio.IncompleteReadError) as error:
                logger.warning("the process that compiles structured outputs could not be read: %r", error)
            finally:
                self._ready.clear()
                for asked in self._asked.values():
                    if not asked.done():
                        asked.set_exception(_ProcessEndedError())
            pause_s = 0.5 if answered else min(pause_s * 2, MAX_PAUSE_S)
            logger.warning("the process that compiles structured outputs ended; starting it again in %.1f s", pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> AsyncGenerator[dict[str, Any], None]:
        """Start the process and yield what it says, until it ends; it is killed if it does not."""
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = ["-P", "-m", "server.structured_outputs.child", str(theirs.fileno()), str(os.getpid())]
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL, env=_environment(),
            )  # fmt: skip
        self.pid = process.pid
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        try:
            argument = b64encode(self._compiler.argument).decode()
            self._send({"job": self._compiler.job, "argument": argument})
            while length := await reader.read(1):
                length += await reader.readexactly(LENGTH_BYTES - 1)
                yield message_of(await reader.readexactly(int.from_bytes(length, "big")))
        finally:
            self._writer.close()
            self._writer = self.pid = None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("ready"):
            self._ready.set()
        elif (asked := self._asked.get(message["number"])) is not None and not asked.done():
            asked.set_result(verdict_of(message))


def _environment() -> dict[str, str]:
    """Ours, with this process's own way to its packages, and without the server's settings: it needs no key."""
    paths = [path for path in (path or os.getcwd() for path in sys.path) if Path(path).exists()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PERFT_")}
    return {**inherited, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
