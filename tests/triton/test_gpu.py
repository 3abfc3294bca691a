"""What only a GPU can show: real graphs, that no step waits for the device, and pools of more than 2^31 values."""

import pytest
import torch

from perft.operator.base import Batch, PlacedAdapter
from tests.triton.test_capture import OPTIONS
from tests.triton.worlds import ALL_LAYERS, World, any_configs, owners

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [1, 16, 32, 64])
def test_a_captured_graph_is_right_for_every_batch_of_its_size(size: int) -> None:
    world = World(torch.bfloat16, rows=8192, options=OPTIONS)
    world.operator.warm_up()
    buffers = {layer: world.inputs([None] * size) for layer in ALL_LAYERS}
    graph = torch.cuda.CUDAGraph()
    step = world.operator.plan(Batch(torch.empty(0, dtype=torch.int64), (), size))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer, buffer in buffers.items():
            step.start(layer, buffer.x_TD, buffer.base)(buffer.output_TD)
    names = world.add_all(any_configs(12))
    for turn, popularity in enumerate(("one", "different", "uniform", "skewed", "some without")):
        owner = owners(popularity, max(1, size - turn), names, world.generator)
        padded = [*owner, *[None] * (size - len(owner))]
        inputs = {layer: world.inputs(padded) for layer in ALL_LAYERS}
        for layer, buffer in buffers.items():
            buffer.fill(inputs[layer])
        world.operator.plan(world.batch(owner, size))
        graph.replay()
        for layer, buffer in buffers.items():
            world.check(padded, inputs[layer], layer, buffer.output_TD)
        evicted = names.pop(0)
        world.evict(evicted)
        names += world.add_all(any_configs(1 + turn)[-1:])


def test_a_step_waits_for_nothing() -> None:
    world = World(torch.bfloat16, rows=8192, options=OPTIONS)
    world.operator.warm_up()
    names = world.add_all(any_configs(12))
    owner = owners("uniform", 33, names, world.generator)
    batch, inputs = world.batch(owner), world.inputs(owner)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises
    try:
        for _ in range(3):
            step = world.operator.plan(batch)
            for layer in ALL_LAYERS:
                step.start(layer, inputs.x_TD, inputs.base)(inputs.output_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_that_are_planned_before_others_ran_keep_their_own_tables() -> None:
    """The host runs ahead of a busy device: a later plan must not reach into an earlier step."""
    world = World(torch.float32, rows=8192, options=OPTIONS)
    world.operator.warm_up()
    names = world.add_all(any_configs(12, layers=None))
    owner = [[names[(t + turn) % 12] for t in range(24)] for turn in range(12)]
    inputs = [world.inputs(one) for one in owner]
    outputs = [one.output_TD.clone() for one in inputs]
    batches = [world.batch(one) for one in owner]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    for batch, one, output_TD in zip(batches, inputs, outputs, strict=True):
        world.operator.plan(batch).start(0, one.x_TD, one.base)(output_TD)
    for names_of_step, one, output_TD in zip(owner, inputs, outputs, strict=True):
        world.check(names_of_step, one, 0, output_TD)


def test_rows_beyond_two_billion_values() -> None:
    hidden_size = 4096
    world = World(torch.bfloat16, hidden_size=hidden_size, rows=2**31 // hidden_size + 4096, holes=False)
    below = world.pool._take(2**31 // hidden_size // 16)  # all that lies below: the adapters come after it
    assert below.pages == tuple(range(len(below.pages)))
    world.pool._taken["below"] = below
    world.pool._placed["below"] = PlacedAdapter(any_configs(1)[0], {}, below.slot)
    names = world.add_all(any_configs(3, layers=None))
    world.run(owners("uniform", 33, names, world.generator))
