"""Owns the signals of a server that starts: each of them ends it, with status 0, whatever it does at that moment.

vLLM's own handler for that time raises KeyboardInterrupt, which its wait for the engine swallows; asyncio's for SIGINT
cancels a task, which a wait on the loop's own thread never notices. Invariant: once a signal came, the process ends
within LAST_EXIT_S; so do its engine and its workers (perft/engine/parent.py), and the store bears a kill at any moment.
"""

import os
import signal
import sys
import threading
import time
from queue import SimpleQueue
from types import FrameType

LAST_EXIT_S = 10.0
"""Seconds after which a server that was told to end while it started ends without waiting for anything."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_on_signals() -> None:
    """From now on a signal ends this process, until others handle it: those of the server that serves. A signal that is
    ignored stays so (SIGHUP under nohup). Call it on the main thread."""
    asked = SimpleQueue[int]()  # a handler may put into it at any moment
    threading.Thread(target=_end_at_last, args=(asked,), name="perft-last-exit", daemon=True).start()

    def end(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the end
        asked.put(number)
        sys.unraisablehook = _end_if_lost
        os.write(2, f"perft: {signal.Signals(number).name}: the server is ending before it was ready\n".encode())
        raise SystemExit(0)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _end_if_lost(lost: "sys.UnraisableHookArgs") -> None:
    """End where Python drops the exception that was to do it: in a fork's hooks, in finalisers."""
    if isinstance(lost.exc_value, SystemExit):
        os._exit(0)
    sys.__unraisablehook__(lost)


def _end_at_last(asked: SimpleQueue[int]) -> None:
    asked.get()
    time.sleep(LAST_EXIT_S)
    os._exit(0)
