"""Which back end of the operator serves, what it accepts, and where its compiled kernels are kept."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.engine.pool import RowPool
from perft.operator.base import Sizes
from perft.operator.choose import BackEndError, choose_operator
from perft.operator.cpu.backend import NumbaOperator
from perft.operator.cpu.kernel_cache import is_private, kernel_folder
from perft.operator.tables import adapter_rows
from perft.operator.torch_backend import TorchOperator
from tests.synthetic import RANDOM_R

SIZES = Sizes(max_tokens=64, max_groups=4, captured_tokens=0, base_experts=4, base_top_k=2)


def pool(dtype: torch.dtype = torch.float32) -> RowPool:
    return RowPool(32, 8, dtype, torch.device("cpu"), 1)


@pytest.mark.parametrize(
    "asked, expected", [("auto", NumbaOperator), ("numba", NumbaOperator), ("torch", TorchOperator)]
)
def test_a_cpu_is_served_by_numba_unless_torch_is_asked_for(asked: Any, expected: type) -> None:
    rows = pool()
    assert type(choose_operator(rows.tensor_RD, rows.tables, SIZES, asked)) is expected


@pytest.mark.parametrize(
    "asked, said", [("triton", "is for GPUs, and the model is on cpu"), ("cuda", "expected one of")]
)
def test_what_cannot_work_here_is_refused(asked: Any, said: str) -> None:
    rows = pool()
    with pytest.raises(BackEndError, match=said):
        choose_operator(rows.tensor_RD, rows.tables, SIZES, asked)


def test_numba_is_refused_where_the_model_is_not_on_the_cpu() -> None:
    rows = pool()
    with pytest.raises(BackEndError, match="for CPUs, and the model is on meta"):
        choose_operator(rows.tensor_RD.to("meta"), rows.tables, SIZES, "numba")


def config(**given: Any) -> AdapterConfig:
    return AdapterConfig.model_validate(RANDOM_R | given)


def test_an_adapter_beyond_a_devices_buffers_is_rejected_by_name() -> None:
    base = BaseShape(8, 1, (0,), 4, 2, torch.float32, max_columns=64, max_routed_experts=4)
    assert fit_violations(config(num_experts=4, bottleneck=16), base) == []
    (found,) = fit_violations(config(num_experts=4, bottleneck=17), base)
    assert found.startswith("bottleneck: found 4 experts of 17, 68 columns in all, expected at most 64")
    (found,) = fit_violations(config(num_experts=5, bottleneck=8), base)
    assert found.startswith("num_experts: found 5, expected at most 4 on this device")


def test_kernels_are_kept_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert kernel_folder() == tmp_path / "mine"


def test_kernels_are_kept_in_the_home_only_if_it_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".cache/perft/kernels"
    assert kernel_folder() == own
    own.chmod(0o777)
    other = kernel_folder()
    assert other != own and is_private(other)
    other.rmdir()
    (tmp_path / "file").touch()
    assert not is_private(tmp_path / "file" / "below a file")


LOAD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from perft.engine.pool import RowPool
from perft.operator.cpu.backend import make_numba_operator
pool = RowPool(32, 8, torch.float32, torch.device("cpu"), 1)
make_numba_operator(pool.tensor_RD, pool.tables)
"""


def test_the_second_start_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True, timeout=600
        ).stdout
        for _ in range(2)
    ]
    assert f"compiled and kept in {tmp_path}" in said[0] and f"loaded from {tmp_path}" in said[1], said


SHAPES = {
    "OLMoE-1B-7B": (16, 2048, 64, ("17.3 MB", "134.2 MB")),
    "Mixtral-8x7B": (32, 4096, 8, ("69.2 MB", "67.1 MB")),
    "Qwen3-30B-A3B": (48, 2048, 128, ("51.9 MB", "805.3 MB")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_page_says_what_an_adapter_takes(name: str) -> None:
    """docs/operations.md, "Memory": R with 8 experts of bottleneck 16, and E with bottleneck 16, bfloat16."""
    layers, hidden, experts, said = SHAPES[name]
    routed = config(num_experts=8, bottleneck=16)
    embedded = AdapterConfig(
        base_model_name_or_path="", variant="E", expert_type="lora", alpha=1.0, num_experts=experts, bottleneck=16
    )
    sizes = [adapter_rows(each, tuple(range(layers))) * hidden * 2 for each in (routed, embedded)]
    assert tuple(f"{size / 1e6:.1f} MB" for size in sizes) == said
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert f"| {name} | {said[0]} | {said[1]} |" in page
