"""Owns that no process of the engine outlives the one that started it: its memory would stay taken, a GPU's above all.

Invariant: the kernel ends such a process, whatever it does at that moment, even if it is stopped. (A thread that waits
for the same would need a running interpreter; PR_SET_PDEATHSIG follows the thread that started the process, which may
end long before its process.)
"""

import os
import signal
import sys
from multiprocessing import current_process, parent_process
from multiprocessing.util import register_after_fork
from select import POLLHUP, poll
from typing import Any

ENGINE_PROCESSES = ("EngineCore", "VllmWorker")
"""How the names of the processes begin that vLLM starts for an engine."""


def end_engines_with_parents() -> None:
    """Call `end_with_parent` now, and in every process that is forked from this one: vLLM's plugins count as loaded
    there, and do not run again."""
    end_with_parent()
    register_after_fork(end_with_parent, lambda act: act())


def install_engine_core() -> None:
    """Have every engine core that is started from here call `end_with_parent` first: vLLM loads plugins there only once
    the parent has answered, and waits minutes for that."""
    from vllm.v1.engine.core import EngineCoreProc

    if EngineCoreProc.run_engine_core is not run_engine_core:
        run_engine_core.__wrapped__ = EngineCoreProc.run_engine_core  # type: ignore[attr-defined]
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """What the process of an engine core runs: vLLM's own, which in a forked process is the one that was wrapped."""
    end_with_parent()
    from vllm.v1.engine.core import EngineCoreProc

    getattr(run_engine_core, "__wrapped__", EngineCoreProc.run_engine_core)(*args, **kwargs)


def end_with_parent() -> None:
    """In a process of the engine: from now on it is killed once its parent has ended.

    multiprocessing gives every child one end of a pipe whose other end only the parent holds. It is closed
    however the parent ends, and the kernel sends a signal of our choice for that (fcntl(2), F_SETSIG). A worker ends
    with the engine core in the same way.
    """
    parent = parent_process()
    if sys.platform != "linux" or parent is None or not current_process().name.startswith(ENGINE_PROCESSES):
        return
    import fcntl

    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    closed = poll()
    closed.register(pipe, POLLHUP)
    if closed.poll(0):  # before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)
