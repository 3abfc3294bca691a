"""Every kernel, compiled for real GPUs without one: the interpreter accepts much that the compiler does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 2**10, 90: 227 * 2**10}
"""Bytes that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


@pytest.mark.parametrize(
    "arguments",
    ["90 bfloat16 2048 128 all", "90 float32 577 4", "80 float16 4096 8"],
    ids=["Qwen3-30B on Hopper", "an odd shape in float32", "Mixtral on Ampere"],
)
def test_every_kernel_compiles(arguments: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.triton.compile_kernels", *arguments.split()]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(kernel["kernel"], kernel["tile"]) for kernel in kernels} >= {
        (name, tile) for name in ("shrink", "expand") for tile in (16, 64)
    }
    assert {kernel["kernel"] for kernel in kernels} == {"route", "shrink", "expand"}
    assert max(kernel["shared"] for kernel in kernels) <= SHARED_MEMORY[int(arguments[:2])]
