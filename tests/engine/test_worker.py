"""What a worker prepares on an accelerator, with stand-ins for the accelerator's parts."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perft.engine.base_router import embedded_problem
from perft.engine.host_cache import Mover
from perft.engine.worker import NULL_BLOCK, PerftWorkerExtension

WAIT_S = 30.0


class Zeroer:
    """vLLM's KVBlockZeroer, which compiles its kernel at the first call."""

    def __init__(self) -> None:
        self.zeroed: list[list[int]] = []

    def zero_block_ids(self, block_ids: list[int]) -> None:
        self.zeroed.append(block_ids)


class Runner:
    """A model runner of vLLM; `attribute` is where this version of it keeps its zeroer."""

    def __init__(self, device: str, attribute: str, is_prepared: bool) -> None:
        self.device, self._attribute, self.prepared = torch.device(device), attribute, 0
        if attribute == "kv_block_zeroer":
            self.kv_block_zeroer: Zeroer | None = None
        if is_prepared:
            setattr(self, attribute, Zeroer())

    def _init_kv_zero_meta(self) -> None:
        self.prepared += 1
        setattr(self, self._attribute, Zeroer())

    @property
    def zeroer(self) -> Zeroer | None:
        return getattr(self, self._attribute, None)


def worker_with(runner: Runner) -> PerftWorkerExtension:
    worker = PerftWorkerExtension()
    worker.model_runner = runner
    return worker


@pytest.mark.parametrize("attribute", ["_kv_block_zeroer", "kv_block_zeroer"], ids=["V1", "V2"])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_the_zeroing_kernel_is_compiled_once_at_start(attribute: str, is_prepared: bool) -> None:
    runner = Runner("cuda", attribute, is_prepared)
    worker = worker_with(runner)
    worker._prepare_zeroing()
    worker._prepare_zeroing()
    assert runner.prepared == (0 if is_prepared else 1)
    assert runner.zeroer is not None and runner.zeroer.zeroed == [[NULL_BLOCK]]


def test_the_cpu_zeroes_without_preparation() -> None:
    runner = Runner("cpu", "_kv_block_zeroer", False)
    worker_with(runner)._prepare_zeroing()
    assert runner.zeroer is None


def test_a_mover_works_on_the_accelerator_of_its_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on number 0, whatever rank the process is."""
    chosen: dict[str, int] = {}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda index: chosen.update({threading.current_thread().name: index})
    )
    mover, seen = Mover(0.0), []
    mover.start("a", lambda: seen.append(chosen.get(threading.current_thread().name)))
    assert mover.outcome("a", WAIT_S).state == "done" and seen == [3]


def layer(**changes: Any) -> Any:
    """A MoE layer whose kernel tells the base's top-k."""
    experts = SimpleNamespace(apply_router_weight_on_input=False, quant_method=object())
    return SimpleNamespace(**{"is_monolithic": False, "routed_experts": experts, "layer_name": "layers.3"} | changes)


def test_a_kernel_that_hides_the_bases_top_k_is_named_with_the_way_out() -> None:
    assert embedded_problem(layer()) is None
    problem = embedded_problem(layer(is_monolithic=True)) or ""
    assert "layers.3" in problem and "start with --moe-backend triton" in problem
