"""Owns the compile process: it loads the compiler once and tries every spec in a fork of itself, which it can kill.

`python -m server.structured_outputs.child FD` is started by `process.py`. Invariant: it and its forks end with the
server, whatever ends the server; no fork outlives its limits or its cancellation.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from server.structured_outputs.wire import LENGTH_BYTES, Outcome, frame, message_of

Job = Callable[[dict[str, Any], list[int]], object]
"""Tries one spec (the kind and value of it, the stop token ids). Raises ValueError with the reason to refuse it."""

STACK_BYTES = 2 * 1024**2
"""A quarter of the stack that the engine compiles with: what recurses too deep there has crashed here."""
THREADS_BYTES = 128 * 1024**2
"""Address space for the stacks of the compiler's own threads, beside the memory that a spec may take."""
KEPT_SHARE = 4
"""What a compiled spec keeps may be this part of what its compile may take."""
MAX_REASON = 600
NICE = 10
_PR_SET_PDEATHSIG = 1
_OUTCOMES: dict[int, Outcome] = {signal.SIGPROF: "too_slow", signal.SIGXCPU: "too_slow", signal.SIGKILL: "too_large"}
"""Signal that ended a fork -> what that means. SIGKILL: of the kernel, short of memory; ours are not looked up."""
_NO_MEMORY = ("bad_alloc", "Cannot allocate memory", "Resource temporarily unavailable")
_PAGE = resource.getpagesize()


@dataclass
class _Fork:
    """A running compile. deadline: monotonic seconds."""

    pid: int
    number: int
    result: int
    deadline: float


@dataclass(frozen=True)
class _Limits:
    """Of one compile. wall_s is for one that gets no CPU time."""

    cpu_s: float
    wall_s: float
    memory_bytes: int


class CompileProcess:
    """The loop: takes specs from the server, forks, reports. One thread, so that a fork is safe."""

    def __init__(self, server: socket.socket, job: Job) -> None:
        self._server, self._job = server, job
        self._received = b""
        self._forks: dict[int, _Fork] = {}
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(server, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Until the server is gone."""
        while True:
            now = time.monotonic()
            for fork in [each for each in self._forks.values() if each.deadline <= now]:
                self._report(fork, "stalled", self._kill(fork))
            nearest = min((each.deadline for each in self._forks.values()), default=None)
            for key, _ in self._waiting.select(None if nearest is None else max(nearest - now, 0.0)):
                if key.data is not None:
                    self._finish(key.data)
                elif not self._take():
                    return

    def _take(self) -> bool:
        """Read what the server sent. False at its end."""
        part = self._server.recv(1 << 16)
        self._received += part
        while len(self._received) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "big")
            if len(self._received) < end:
                break
            message, self._received = message_of(self._received[LENGTH_BYTES:end]), self._received[end:]
            self._handle(message)
        return bool(part)

    def _handle(self, message: dict[str, Any]) -> None:
        number = message["number"]
        if message.get("cancel"):
            if number in self._forks:
                self._kill(self._forks[number])
            return
        limits = _Limits(message["cpu_s"], message["wall_s"], message["memory_bytes"])
        reader, writer = os.pipe()
        us = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._server.close()
            os.close(reader)
            _compile(self._job, message, limits, writer, us)
        os.close(writer)
        fork = self._forks[number] = _Fork(pid, number, reader, time.monotonic() + limits.wall_s)
        self._waiting.register(reader, selectors.EVENT_READ, fork)

    def _finish(self, fork: _Fork) -> None:
        """A fork wrote its result, or ended without one: its end of the pipe closes only as it ends."""
        body = b""
        while part := os.read(fork.result, 1 << 16):
            body += part
        status, cpu_s = self._reap(fork)
        if body and os.WIFEXITED(status):
            return self._report(fork, **json.loads(body))
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self._report(fork, _OUTCOMES.get(ended_by, "crashed"), cpu_s)

    def _kill(self, fork: _Fork) -> float:
        """Returns the CPU seconds it took."""
        os.kill(fork.pid, signal.SIGKILL)  # still ours: its number is free only once it is reaped
        return self._reap(fork)[1]

    def _reap(self, fork: _Fork) -> tuple[int, float]:
        """Wait for a fork that ends. Returns its wait status and its CPU seconds."""
        del self._forks[fork.number]
        self._waiting.unregister(fork.result)
        os.close(fork.result)
        _, status, used = os.wait4(fork.pid, 0)
        return status, used.ru_utime + used.ru_stime

    def _report(self, fork: _Fork, outcome: Outcome, cpu_s: float, reason: str = "") -> None:
        self._server.sendall(frame({"number": fork.number, "outcome": outcome, "reason": reason, "cpu_s": cpu_s}))


def _compile(job: Job, message: dict[str, Any], limits: _Limits, writer: int, parent: int) -> NoReturn:
    """What a fork does: try one spec within its limits, and write what became of it."""
    try:
        die_with(parent)
        _limit(limits)
        before = _memory_bytes(1)
        attempt = _Attempt(lambda: job(message["spec"], message["stop_tokens"]))
        attempt.run_on_small_stack()
        if attempt.outcome == "passed" and _memory_bytes(1) - before > limits.memory_bytes // KEPT_SHARE:
            attempt.outcome = "too_large"
        found = {"outcome": attempt.outcome, "reason": attempt.reason, "cpu_s": time.process_time()}
        os.write(writer, json.dumps(found).encode())
    finally:
        os._exit(0)


@dataclass
class _Attempt:
    """One try of a spec. kept: what the job returned, alive until its memory was measured."""

    work: Callable[[], object]
    outcome: Outcome = "crashed"
    reason: str = ""
    kept: object = None

    def run_on_small_stack(self) -> None:
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=self._run)
        thread.start()
        thread.join()

    def _run(self) -> None:
        try:
            self.kept = self.work()
            self.outcome = "passed"
        except MemoryError:
            self.outcome = "too_large"
        except Exception as error:
            text = str(error) or type(error).__name__
            self.outcome = "too_large" if any(each in text for each in _NO_MEMORY) else "refused"
            self.reason = text[:MAX_REASON]


def _limit(limits: _Limits) -> None:
    """CPU time of all threads, address space; no core file and no output; the first to be killed short of memory."""
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    seconds = int(limits.cpu_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    space = _memory_bytes(0) + limits.memory_bytes + THREADS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _memory_bytes(column: int) -> int:
    """Of this process: 0 its address space, 1 what of it is resident."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[column]) * _PAGE


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if it has already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(server: socket.socket, parent: int) -> None:
    """Load what the first frame names (`module:function` and its argument), say so, and take specs."""
    die_with(parent)
    for each in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which ends this process when it is done
        signal.signal(each, signal.SIG_IGN)
    os.nice(NICE)
    stream = server.makefile("rb")
    setup = message_of(stream.read(int.from_bytes(stream.read(LENGTH_BYTES), "big")))
    module, _, name = setup["job"].partition(":")
    job: Job = getattr(importlib.import_module(module), name)(b64decode(setup["argument"]))
    gc.collect()
    gc.freeze()  # or every fork would copy what its garbage collector touches
    server.sendall(frame({"ready": True}))
    CompileProcess(server, job).run()
    os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
