"""Owns how the threads behave that load and check adapters beside an engine's or a server's own thread.

Invariant: such a thread works alone, and at the usual priority. Its lowest priority would be theirs too: it would hold
the interpreter's lock while it waits for a processor that the engine keeps busy, and whoever wants that lock would
wait with it, for hundreds of milliseconds.
"""

import threading

import torch


def compute_alone() -> None:
    """From now on torch uses this thread alone for what this thread asks of it; others are as before.

    A team of threads meets at the end of every operation. Where an engine keeps the processors busy, each of these
    meetings waits for all of them, and there are hundreds in one adapter.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and what new threads begin with, which another one mends
    mend = threading.Thread(target=torch.set_num_threads, args=(usual,))
    mend.start()
    mend.join()
