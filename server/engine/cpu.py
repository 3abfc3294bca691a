"""Owns how the engine runs on a CPU where nobody says otherwise.

vLLM's defaults are made for machines with many cores and several memory nodes that serve one model and nothing else.
"""

import os
from argparse import Namespace
from collections.abc import MutableMapping
from pathlib import Path

IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the worker in the engine's process. With vLLM's default for CPUs the engine busy-waits for the worker, on a core
that should compute."""
MEMORY_SHARE = 0.5
"""vLLM does not start if less than its share of the memory is free; its own default is 0.92."""
SPIN_COUNT = "1000"
"""Turns that an OpenMP thread waits awake for its next work, before it sleeps. GNU's default is about 100 times as
much: 5 % faster where the processors are free, and four times slower beside one process that computes."""
NODES = Path("/sys/devices/system/node")


def use_cpu_defaults(args: Namespace, environment: MutableMapping[str, str] = os.environ, nodes: Path = NODES) -> None:
    """Complete the flags of `perft serve` for a CPU.

    With one memory node and one rank every core computes, the worker in the engine's process; otherwise vLLM's own
    binding of ranks to nodes stays. Threads wait awake only briefly.
    """
    args.enforce_eager = True  # vLLM compiles no model with LoRA on CPUs, but would give up its own CPU kernels
    if args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = MEMORY_SHARE
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
    one_rank = args.tensor_parallel_size == 1 and len(list(nodes.glob("node[0-9]*"))) <= 1
    if one_rank and environment.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if args.distributed_executor_backend is None:
            args.distributed_executor_backend = IN_ENGINE
