"""A compiled base serves adapters: nothing of ours is traced, and no step's plan is baked into the graph."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import ENVIRONMENT


def compiled(kind: str, folder: Path, with_perft: str) -> dict[str, Any]:
    """What `tests.engine.compiled` wrote, which has checked every answer of an adapter against the reference."""
    output = folder / f"{kind}-{with_perft}.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.compiled", kind, str(folder), with_perft, str(output)],
        env={**os.environ, **ENVIRONMENT, "TORCHDYNAMO_DISABLE": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_compiled_base_answers_adapters_right_and_its_graph_is_vllms_own(kind: str, tmp_path: Path) -> None:
    ours, vllms = compiled(kind, tmp_path, "yes"), compiled(kind, tmp_path, "no")
    assert ours["answers"] == 12
    assert ours["graphs"] and all("moe_forward" in graph for graph in ours["graphs"])
    assert ours["graphs"][: len(vllms["graphs"])] == vllms["graphs"][: len(ours["graphs"])]
