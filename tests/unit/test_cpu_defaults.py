"""What `perft serve` fills in on a CPU, and what it leaves alone."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from server.engine.cpu import IN_ENGINE, MEMORY_SHARE, SPIN_COUNT, use_cpu_defaults

GIVEN: dict[str, Any] = {
    "enforce_eager": False, "gpu_memory_utilization": None, "tensor_parallel_size": 1,
    "distributed_executor_backend": None,
}  # fmt: skip


def completed(tmp_path: Path, nodes: int = 1, environment: dict[str, str] | None = None, **given: Any) -> Namespace:
    for number in range(nodes):
        (tmp_path / f"node{number}").mkdir()
    (tmp_path / "online").touch()
    args = Namespace(**GIVEN | given, environment={} if environment is None else environment)
    use_cpu_defaults(args, args.environment, tmp_path)
    return args


def test_one_node_computes_on_every_core_in_the_engines_process(tmp_path: Path) -> None:
    args = completed(tmp_path)
    assert args.distributed_executor_backend == IN_ENGINE
    assert args.environment == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "GOMP_SPINCOUNT": SPIN_COUNT}
    assert args.enforce_eager and args.gpu_memory_utilization == MEMORY_SHARE


@pytest.mark.parametrize("nodes", [0, 1])
def test_no_node_is_told_of_where_sys_is_not_mounted(tmp_path: Path, nodes: int) -> None:
    assert completed(tmp_path, nodes).distributed_executor_backend == IN_ENGINE


@pytest.mark.parametrize(
    "case",
    [
        {"nodes": 2},
        {"tensor_parallel_size": 2},
        {"environment": {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}},
    ],
    ids=["two nodes", "two ranks", "threads bound"],
)
def test_vllms_own_binding_stays(tmp_path: Path, case: dict[str, Any]) -> None:
    before = {"GOMP_SPINCOUNT": SPIN_COUNT} | dict(case.get("environment", {}))
    args = completed(tmp_path, **case)
    assert args.distributed_executor_backend is None and args.environment == before


def test_what_was_said_stays(tmp_path: Path) -> None:
    args = completed(tmp_path, gpu_memory_utilization=0.92, distributed_executor_backend="mp")
    assert args.gpu_memory_utilization == 0.92 and args.distributed_executor_backend == "mp"


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_the_operators_to_say(tmp_path: Path, said: dict[str, str]) -> None:
    environment = completed(tmp_path, environment=dict(said)).environment
    assert {name: environment.get(name) for name in said} == said and len(environment) == 2
