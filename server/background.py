"""Owns how threads beside the event loop behave: they give way to everything else."""

import os
import threading


def yield_to_everybody() -> None:
    """Give this thread (and those it starts) the lowest priority."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
