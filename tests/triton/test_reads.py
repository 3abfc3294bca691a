"""Which rows of the pool the kernels read: the interpreter sees every address. A read row costs time on a device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from perft.operator.base import Rows
from perft.operator.gpu import backend as triton_backend
from tests.triton.test_reference import GATES, selected
from tests.triton.worlds import EXPERT_TYPES, VARIANTS, World, config_of

EVERY_GATE = {**GATES, "dense": VARIANTS[4], "single": VARIANTS[5]}


@contextmanager
def pool_reads(pool_RD: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """By kernel: how many times each value of the pool was read, int64 [R, D]."""
    reads: dict[str, torch.Tensor] = {}
    load, launch, kernel_name = InterpreterBuilder.create_masked_load, triton_backend.launch, ""

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        places = (pointers.data[mask.data].astype(np.int64) - pool_RD.data_ptr()) // pool_RD.element_size()
        inside = torch.from_numpy(places[(places >= 0) & (places < pool_RD.numel())])
        counts = reads.setdefault(kernel_name, torch.zeros(pool_RD.shape, dtype=torch.int64))
        counts.view(-1).index_add_(0, inside, torch.ones_like(inside))
        return load(self, pointers, mask, *rest)

    def named_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        nonlocal kernel_name
        kernel_name = kernel.fn.__name__
        launch(kernel, grid, *arguments, **constants)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", create_masked_load),
        mock.patch.object(triton_backend, "launch", named_launch),
    ):
        yield reads


def rows_of(part: Rows, experts: torch.Tensor, bottleneck: int) -> torch.Tensor:
    """The rows in the pool of some experts' part."""
    numbers = torch.arange(part.start, part.stop) if isinstance(part, slice) else part
    return numbers.view(-1, bottleneck)[experts].flatten()


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("gate", EVERY_GATE)
def test_a_tile_reads_the_rows_of_selected_experts_and_each_once(gate: str, tokens: int) -> None:
    world = World(torch.float32, hidden_size=300, seed=tokens)
    given: Mapping[str, Any] = {**EVERY_GATE[gate], **EXPERT_TYPES[0], "bottleneck": 5, "layers": (2,)}
    names = world.add_all([config_of(5, **given), config_of(5, **given)])
    inputs = world.inputs([names[0]] * tokens)
    step = world.operator.plan(world.batch([names[0]] * tokens))
    pool_RD = world.pool.tensor_RD
    with pool_reads(pool_RD) as reads:
        step.start(2, inputs.x_TD, inputs.base)(inputs.output_TD)
    adapter, rows = world.adapters[names[0]], world.placed(names[0]).layers[2]
    used_M = torch.ones(adapter.config.num_experts, dtype=torch.bool)
    if gate in GATES:
        adapter.layers[0] = adapter.layers[2]
        used_M = selected(adapter, inputs.x_TD, inputs.base.routing(torch.arange(tokens))).any(0)
        assert tokens > 1 or not used_M.all()
    experts = torch.nonzero(used_M).flatten()
    expected = {name: torch.zeros_like(reads["shrink"]) for name in ("route", "shrink", "expand")}
    if rows.router is not None:
        expected["route"][rows.router] = 1
    expected["shrink"][rows_of(rows.down, experts, 5)] = 1
    expected["expand"][rows_of(rows.up, experts, 5)] = 1
    for name, expected_RD in expected.items():
        assert torch.equal(reads[name], expected_RD), name
