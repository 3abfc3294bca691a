"""What captured graphs ask of the back end: a step recorded once is right for every later batch of its size."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from perft.operator.base import Batch
from tests.triton.device import DEVICE
from tests.triton.recorder import Recording, recorded
from tests.triton.worlds import ALL_LAYERS, EXPERT_TYPES, VARIANTS, Inputs, J, World, any_configs, config_of, owners

SIZES = {"decode": 32, "prefill": 80}
OPTIONS = {"decode_tokens": 64, "max_groups": 12}
NOBODY = Batch(torch.empty(0, dtype=torch.int64), (), 0)


@dataclass
class Graph:
    """A step of `size` tokens as it was captured: its launches, and for each layer the buffers that they know."""

    world: World
    size: int
    buffers: dict[int, Inputs]
    recording: Recording

    def replay(self, owner: Sequence[str | None]) -> None:
        """Plan a batch, replay, and check every layer's output; the tokens up to `size` that it lacks are padding."""
        padded = [*owner, *[None] * (self.size - len(owner))]
        inputs = {layer: self.world.inputs(padded) for layer in ALL_LAYERS}
        for layer, buffer in self.buffers.items():
            buffer.fill(inputs[layer])
        with recorded() as planning:
            self.world.operator.plan(self.world.batch(owner, self.size))
        assert not planning.launches
        self.recording.replay()
        for layer, buffer in self.buffers.items():
            self.world.check(padded, inputs[layer], layer, buffer.output_TD)


def capture(world: World, size: int, batch: Batch | None = None) -> Graph:
    """Record a step, as vLLM does: while it warms up, when no token has an adapter (`batch` None)."""
    buffers = {layer: world.inputs([None] * size) for layer in ALL_LAYERS}
    return Graph(world, size, buffers, run(world, size, buffers, batch))


def run(world: World, size: int, buffers: dict[int, Inputs], batch: Batch | None = None) -> Recording:
    """The launches of one step over all layers."""
    step = world.operator.plan(batch or Batch(NOBODY.tokens_n, (), size))
    with recorded() as recording:
        for layer in ALL_LAYERS:
            step.start(layer, buffers[layer].x_TD, buffers[layer].base)(buffers[layer].output_TD)
    return recording


@pytest.fixture(params=SIZES)
def graph(request: pytest.FixtureRequest) -> Graph:
    return capture(World(torch.float32, rows=8192, options=OPTIONS), SIZES[request.param])


def test_a_warm_up_step_changes_nothing(graph: Graph) -> None:
    before = {layer: buffer.output_TD.clone() for layer, buffer in graph.buffers.items()}
    graph.recording.replay()
    for layer, buffer in graph.buffers.items():
        assert torch.equal(buffer.output_TD, before[layer])


def test_a_replay_is_right_for_every_batch_of_its_size(graph: Graph) -> None:
    names = graph.world.add_all(any_configs(12))
    for popularity in ("one", "different", "uniform", "skewed", "some without"):
        graph.replay(owners(popularity, graph.size, names, graph.world.generator))


def test_a_replay_is_right_for_padded_batches(graph: Graph) -> None:
    names = graph.world.add_all(any_configs(12))
    for tokens in (graph.size, graph.size - 1, 1, 7):
        graph.replay(owners("different", tokens, names, graph.world.generator))
        tile_slot_N = graph.world.operator.step_table.parts[1]
        perm_T = graph.world.operator.step_table.parts[0]
        assert (tile_slot_N >= 0).any() and (tile_slot_N[graph.world.operator.tiles(graph.size) :] == -1).all()
        assert (perm_T[tokens:] == -1).all()


def test_a_replay_is_right_when_evicted_slots_hold_other_adapters(graph: Graph) -> None:
    """Each time an adapter's slot and rows go to one of another variant, of other layers."""
    world, configs = graph.world, any_configs(12)
    names = world.add_all(configs[:4])
    for turn in range(1, 4):
        variants = {world.placed(name).slot: world.adapters[name].config.variant for name in names}
        graph.replay(owners("uniform", graph.size - turn, names, world.generator))
        for name in names:
            world.evict(name)
        names = world.add_all(configs[turn * 2 : turn * 2 + 4])
        again = {world.placed(name).slot: world.adapters[name].config.variant for name in names}
        assert again.keys() == variants.keys() and again != variants
    graph.replay(owners("different", graph.size, names, world.generator))


def test_a_replay_asks_nothing_of_a_step_without_adapters(graph: Graph) -> None:
    """After a step with adapters, one without leaves the output as it is."""
    names = graph.world.add_all(any_configs(4))
    graph.replay(owners("uniform", graph.size, names, graph.world.generator))
    graph.replay([None] * graph.size)


def test_the_launches_are_the_same_for_every_batch(graph: Graph) -> None:
    world = graph.world
    names = world.add_all(any_configs(12))
    expected = graph.recording.described()
    assert len(expected) == 3 * len(ALL_LAYERS), "a layer is made by three launches"
    for popularity in ("one", "different", "some without"):
        owner = owners(popularity, graph.size, names, world.generator)
        for tokens in (graph.size, 5):
            batch = world.batch(owner[:tokens], graph.size)
            assert run(world, graph.size, graph.buffers, batch).described() == expected


def test_a_graph_of_one_size_is_right_after_steps_of_another() -> None:
    """Graphs of several sizes, and steps that no graph was captured for, use the same buffers in turn."""
    world = World(torch.float32, rows=8192, options=OPTIONS)
    graphs = [capture(world, size) for size in (1, 16, 64)]
    names = world.add_all(any_configs(12))
    for graph in (*graphs, *reversed(graphs)):
        world.run(owners("uniform", 97, names, world.generator))
        graph.replay(owners("different", graph.size, names, world.generator))


def test_counting_is_part_of_the_graph() -> None:
    counts_SM = torch.zeros(512, 8, dtype=torch.int32, device=DEVICE)
    graph = capture(World(torch.float32, rows=8192, options=OPTIONS | {"counts": counts_SM}), 16)
    names = graph.world.add_all(
        [config_of(0, **VARIANTS[3], **EXPERT_TYPES[0], bottleneck=4, layers=(0,))]
    )  # E: J a token
    for times in (1, 2):
        graph.replay([*names * 5])
        assert counts_SM.sum() == counts_SM[graph.world.placed(names[0]).slot].sum() == 5 * J * times


def test_buffers_stay_where_they_are() -> None:
    world = World(torch.float32, rows=8192, options=OPTIONS)
    operator = world.operator

    def addresses() -> list[int]:
        tensors = [value for value in vars(operator).values() if isinstance(value, torch.Tensor)]
        tables = [operator.tables.page_index, operator.tables.layer_offset, operator.tables.meta]
        return [tensor.data_ptr() for tensor in (*tensors, *tables, *operator.step_table.parts)]

    before = addresses()
    names = world.add_all(any_configs(12))
    for tokens in (1, 33, 97):
        world.run(owners("uniform", tokens, names, world.generator))
    world.evict(names[0])
    operator.warm_up()
    assert addresses() == before and len(before) >= 12
