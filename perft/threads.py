"""Owns how the threads behave that load and check adapters beside an engine's or a server's main thread.

Invariant: such a thread computes without helpers, and at the usual priority. A low priority would slow the main thread
too: the low one would hold the GIL while it waits for a CPU that the engine keeps busy, and every thread that needs
the GIL would wait with it, for hundreds of milliseconds.
"""

import threading

import torch


def compute_alone() -> None:
    """Make torch compute on the calling thread only, for what this thread asks of it; other threads are not affected.

    A pool of threads synchronises at the end of every operation. Where an engine keeps the CPUs busy, each of these
    waits for all of them, and one adapter takes hundreds.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and the default of new threads, which another thread restores
    restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restore.start()
    restore.join()
