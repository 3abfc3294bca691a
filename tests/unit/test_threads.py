"""Threads beside an engine compute alone, and take nothing from the engine's own."""

import subprocess
import sys

CODE = """
import os
import torch
from concurrent.futures import ThreadPoolExecutor
from perft.threads import compute_alone

torch.set_num_threads(3)
priority = os.getpriority(os.PRIO_PROCESS, 0)
with ThreadPoolExecutor(1, initializer=compute_alone) as alone, ThreadPoolExecutor(1) as later:
    print(alone.submit(torch.get_num_threads).result(), alone.submit(torch.get_num_threads).result())
    print(torch.get_num_threads(), later.submit(torch.get_num_threads).result())
    print(alone.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == priority)
"""


def test_a_thread_computes_alone_and_others_as_before() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "1", "3", "3", "True"]
