"""`python -m tests.engine.process_chain METHOD DOES NAME ...`: a process that starts one of each name, each by the one
before, prints their process ids in order and sleeps. All are told to end with their parent, unless they inherit it."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from perft.engine.parent import end_engines_with_parents, end_with_parent


def be(names: list[str], method: str, does: str, say: Connection) -> None:
    if does != "inherit":
        end_with_parent()
    say.send(os.getpid())
    if names:
        start(names, method, does, say)
    if does == "busy":
        sum(range(10**12))  # one call of C code that keeps the interpreter's lock
    time.sleep(3600)


def start(names: list[str], method: str, does: str, say: Connection) -> None:
    context = multiprocessing.get_context(method)
    context.Process(target=be, args=(names[1:], method, does, say), name=names[0]).start()  # type: ignore[attr-defined]


def main() -> None:
    method, does, *names = sys.argv[1:]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    if does == "inherit":
        end_engines_with_parents()
    listen, say = multiprocessing.Pipe(duplex=False)
    starting = threading.Thread(target=start, args=(names, method, does, say))
    starting.start()
    starting.join()  # a thread that ends is no parent that ends
    print(*(listen.recv() for _ in names), flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
