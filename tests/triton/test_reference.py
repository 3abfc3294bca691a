"""The Triton back end against the reference: mixed batches, every variant, pools with holes, both sizes of tiles."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch

from perft.reference import BaseRouting, LayerWeights
from tests.triton.device import DEVICE
from tests.triton.worlds import (
    ALL_LAYERS,
    EXPERT_TYPES,
    POPULARITY,
    TOLERANCE,
    VARIANTS,
    Adapter,
    J,
    N,
    World,
    any_configs,
    config_of,
    owners,
)  # fmt: skip

BOTTLENECKS = (1, 3, 16, 37, 64)
BATCHES = (1, 2, 7, 33, 97)
TILES = {"decode": {"decode_tokens": 128}, "prefill": {"decode_tokens": 0}}
GATES = {"renormalized": VARIANTS[0], "plain": VARIANTS[1], "base_slot": VARIANTS[2], "embedded": VARIANTS[3]}
"""Every way to choose experts."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(VARIANTS) * len(EXPERT_TYPES) * len(BOTTLENECKS)))
def test_against_the_reference(number: int, dtype: torch.dtype) -> None:
    """Every variant x expert type x bottleneck; tiles, batch, popularity, holes, experts and layers vary with them."""
    variant, expert_type, bottleneck = list(product(VARIANTS, EXPERT_TYPES, BOTTLENECKS))[number]
    batch, popularity = list(product(BATCHES, POPULARITY))[number * 7 % 25]
    tiles = TILES["decode" if number % 2 else "prefill"]
    world = World(dtype, hidden_size=(24, 21)[number // 2 % 2], holes=number % 3 != 0, seed=number, options=tiles)
    main = config_of(number // 5 + number // 20, **(variant | expert_type | {"bottleneck": bottleneck}))
    names = world.add_all([main, *any_configs(4)])
    world.run(owners(popularity, min(batch, 33), names, world.generator), (torch.int32, torch.int64)[number % 2])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tiles", TILES)
def test_every_batch_over_every_popularity(tiles: str, batch: int, popularity: str) -> None:
    world = World(torch.float32, rows=16384, holes=batch % 2 == 0, seed=batch, options=TILES[tiles])
    names = world.add_all(any_configs(min(batch, 40)))
    world.run(owners(popularity, batch, names, world.generator))


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
@pytest.mark.parametrize("tiles", TILES)
def test_every_top_k(tiles: str, gate: Mapping[str, Any], experts: int) -> None:
    most = min(experts, J) if "gate_weight" in gate else experts
    given = {**gate, **EXPERT_TYPES[0], "bottleneck": 4, "num_experts": experts, "layers": None}
    world = World(torch.float32, seed=experts, options=TILES[tiles])
    names = world.add_all(config_of(0, **given, top_k=k) for k in range(1, most + 1))
    world.run([names[i % most] for i in range(33)])


@pytest.mark.parametrize("hidden_size", [1, 129, 300, 640])
@pytest.mark.parametrize("tiles", TILES)
def test_a_hidden_size_of_several_blocks(tiles: str, hidden_size: int) -> None:
    world = World(torch.float32, hidden_size=hidden_size, rows=2048, options=TILES[tiles])
    names = world.add_all(any_configs(6, layers=None))
    world.run([*names, None, *names])


@pytest.mark.parametrize(
    "given",
    [
        {"variant": "R", "renormalize": True, "num_experts": 300, "top_k": 17, "bottleneck": 1},
        {"variant": "R", "renormalize": False, "num_experts": 70, "top_k": 70, "bottleneck": 3},
        {"variant": "R", "renormalize": False, "gate_weight": "base_slot", "num_experts": 70, "bottleneck": 2},
        {"variant": "D", "num_experts": 448, "bottleneck": 1},
        {"variant": "S", "num_experts": 1, "bottleneck": 448},
    ],
    ids=["300 experts", "all of 70", "base_slot of 70", "dense 448", "bottleneck 448"],
)
@pytest.mark.parametrize("tiles", TILES)
def test_many_experts_and_many_columns(tiles: str, given: dict[str, Any]) -> None:
    world = World(torch.float32, rows=16384, options=TILES[tiles] | {"max_experts": 300})
    wide = config_of(1, **given, **EXPERT_TYPES[1], layers=(0,))
    embedded = config_of(0, **VARIANTS[3], **EXPERT_TYPES[0], bottleneck=3, layers=(0,))
    names = world.add_all([wide, embedded, *any_configs(2)])
    world.run([*names, *names[:2] * 20])  # with so many columns a tile is routed 16 tokens at a time


@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
def test_the_router_is_summed_in_float32(gate: Mapping[str, Any]) -> None:
    """Logits near 200 stand half a unit apart in bfloat16: rounded there, weights would be off by a third."""
    world = World(torch.bfloat16)
    given = {**gate, **EXPERT_TYPES[1], "bottleneck": 4, "num_experts": 4, "top_k": 2, "layers": (0,)}
    weights = world.make(config_of(0, **given)).layers[0]
    common_D = torch.randn(24, generator=world.generator) * 3
    router = common_D.expand(4, 24) + torch.randn(4, 24, generator=world.generator) / 8
    layer = LayerWeights(router.to(torch.bfloat16), weights.down_proj, weights.up_proj)
    world.add("close", Adapter(config_of(0, **given), {0: layer}))
    owner = ["close"] * 16
    inputs = world.inputs(owner)
    inputs.x_TD.copy_(common_D + torch.randn(16, 24, generator=world.generator) / 4)
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(owner)).start(0, inputs.x_TD, inputs.base)(output_TD)
    world.check(owner, inputs, 0, output_TD)


def huge(weights: LayerWeights, expert: int, part: str, scale: float) -> LayerWeights:
    """`weights`, with one expert whose output is infinite or NaN for nearly every x; finite after `scale` (FORMAT)."""
    changed = {"down_proj": weights.down_proj.clone(), "up_proj": weights.up_proj.clone()}
    changed[part][expert] = 0.9 * torch.finfo(weights.up_proj.dtype).max / max(scale, 1.0)
    return LayerWeights(weights.router, **changed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", ["down_proj", "up_proj"])
@pytest.mark.parametrize("expert_type", EXPERT_TYPES, ids=["lora", "silu", "relu", "gelu"])
@pytest.mark.parametrize("gate", GATES)
def test_an_expert_that_overflows_reaches_only_the_tokens_that_selected_it(
    gate: str, expert_type: Mapping[str, Any], part: str, dtype: torch.dtype
) -> None:
    world = World(dtype, seed=3, options=TILES["prefill" if part == "up_proj" else "decode"])
    routed = {} if gate == "embedded" else {"num_experts": N, "top_k": 2}
    config = config_of(0, **{**GATES[gate], **expert_type, **routed, "bottleneck": 4, "layers": (0,)})
    sound = world.make(config)
    weights = sound.layers[0]
    world.add("broken", Adapter(config, {0: huge(weights, 1, part, config.scale)}))
    owner = ["broken"] * 24
    inputs = world.inputs(owner)
    inputs.x_TD.mul_(10)
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(owner)).start(0, inputs.x_TD, inputs.base)(output_TD)
    selected_T = selected(sound, inputs.x_TD.cpu(), inputs.base.routing(torch.arange(24)))[:, 1]
    assert selected_T.any() and not selected_T.all()
    expected = inputs.expected(sound, 0, torch.nonzero(~selected_T).flatten())
    output_TD = output_TD.cpu()
    assert (output_TD[~selected_T].float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert not output_TD[selected_T].isfinite().all(), "the expert does not overflow where it is selected"


def selected(adapter: Adapter, x_TD: torch.Tensor, routing: BaseRouting) -> torch.Tensor:
    """Which experts each token selects, [T, M]."""
    router = adapter.layers[0].router
    if router is None:
        return routing.weights_TN != 0
    assert adapter.config.top_k is not None
    logits_TM = x_TD.float() @ router.float().T
    chosen_TK = logits_TM.topk(adapter.config.top_k).indices
    return torch.zeros(logits_TM.shape, dtype=torch.bool).scatter(1, chosen_TK, True)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("gate", [*GATES.values(), *VARIANTS[4:]], ids=[*GATES, "dense", "single"])
def test_a_token_that_is_not_finite_spoils_itself_and_no_other(gate: Mapping[str, Any], value: float) -> None:
    world = World(torch.float32)
    names = world.add_all([config_of(6, **{**gate, **EXPERT_TYPES[2], "bottleneck": 4, "layers": (0,)})])
    owner = names * 9
    inputs = world.inputs(owner)
    inputs.x_TD[4, 3] = value
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(owner)).start(0, inputs.x_TD, inputs.base)(output_TD)
    assert not output_TD[4].isfinite().all()
    kept = torch.tensor([t for t in range(9) if t != 4])
    torch.testing.assert_close(output_TD[kept].cpu(), inputs.expected(world.adapters[names[0]], 0, kept))


@pytest.mark.parametrize("logits", [[torch.nan] * N, [torch.inf, 0, 0, 1, 1, 2]], ids=["nan", "inf"])
def test_base_logits_that_are_not_finite_spoil_their_token(logits: list[float]) -> None:
    world = World(torch.float32)
    names = world.add_all([config_of(6, **{**VARIANTS[2], **EXPERT_TYPES[0], "bottleneck": 4, "layers": (0,)})])
    inputs = world.inputs(names * 3)
    inputs.base.logits_TN[1] = torch.tensor(logits)
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(names * 3)).start(0, inputs.x_TD, inputs.base)(output_TD)
    assert not output_TD[1].isfinite().any() and output_TD[[0, 2]].isfinite().all()


def test_base_experts_that_the_base_ruled_out_have_probability_0() -> None:
    """Fewer possible base experts than K: the others' probability is 0, and none is taken twice."""
    world = World(torch.float32)
    given = {**VARIANTS[2], **EXPERT_TYPES[0], "num_experts": 5, "top_k": 3, "bottleneck": 4, "layers": (0,)}
    names = world.add_all([config_of(0, **given)])
    inputs = world.inputs(names * 7)
    inputs.base.logits_TN[:, 1:] = -torch.inf
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(names * 7)).start(0, inputs.x_TD, inputs.base)(output_TD)
    world.check(names * 7, inputs, 0, output_TD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    """A delta of just over 1, on an output whose neighbours lie 2 apart: rounded before the sum it is lost."""
    world = World(dtype)
    config = config_of(0, **VARIANTS[4], **EXPERT_TYPES[0] | {"alpha": 1.0}, bottleneck=1, num_experts=2, layers=(0,))
    ulp = torch.finfo(dtype).eps  # of numbers from 1 to 2
    down = torch.zeros(2, 1, 24)
    down[:, 0, 0] = 1
    up = torch.stack([torch.full((24, 1), 1.0), torch.full((24, 1), ulp / 4)])
    world.add("exact", Adapter(config, {0: LayerWeights(None, down.to(dtype), up.to(dtype))}))
    inputs = world.inputs(["exact"])
    inputs.x_TD[0] = 1
    before = 2 / ulp  # numbers from here on lie 2 apart: a delta of 1 alone is a tie, broken to even
    output_TD = torch.full_like(inputs.output_TD, before)
    expected = (torch.tensor(before, dtype=torch.float64) + 1 + ulp / 4).to(dtype)
    rounded_first = (torch.tensor(before, dtype=torch.float64) + torch.tensor(1 + ulp / 4, dtype=dtype)).to(dtype)
    assert expected != rounded_first
    world.operator.plan(world.batch(["exact"])).start(0, inputs.x_TD, inputs.base)(output_TD)
    assert (output_TD == expected.to(DEVICE)).all()


def test_the_delta_is_added_to_what_is_there() -> None:
    world = World(torch.float32)
    names = world.add_all(any_configs(3, layers=(0,)))
    inputs = world.inputs(names)
    before_TD = torch.randn(3, 24, generator=world.generator).to(DEVICE)
    output_TD = before_TD.clone()
    world.operator.plan(world.batch(names)).start(0, inputs.x_TD, inputs.base)(output_TD)
    deltas = [inputs.expected(world.adapters[name], 0, torch.tensor([t])) for t, name in enumerate(names)]
    torch.testing.assert_close(output_TD.cpu(), before_TD.cpu() + torch.cat(deltas))


def test_the_same_bits_every_time() -> None:
    world = World(torch.bfloat16)
    names = world.add_all(any_configs(6, layers=None))
    owner = [names[i % 6] for i in range(33)]
    inputs = world.inputs(owner)
    outputs = []
    for _ in range(2):
        outputs.append(inputs.output_TD.clone())
        world.operator.plan(world.batch(owner)).start(0, inputs.x_TD, inputs.base)(outputs[-1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("tiles", TILES)
def test_each_adapter_answers_in_a_mixed_batch_as_alone(tiles: str) -> None:
    """Bit by bit: an adapter's tokens stand in tiles of their own, whatever else is in the step."""
    world = World(torch.bfloat16, options=TILES[tiles])
    names = world.add_all(any_configs(5, layers=None))
    owner: list[str | None] = [names[i * i % 5] for i in range(40)]
    inputs = world.inputs(owner)
    mixed_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(owner)).start(0, inputs.x_TD, inputs.base)(mixed_TD)
    for name in set(owner):
        alone_TD = inputs.output_TD.clone()
        batch = world.batch([other if other == name else None for other in owner])
        world.operator.plan(batch).start(0, inputs.x_TD, inputs.base)(alone_TD)
        own_T = torch.tensor([other == name for other in owner])
        assert torch.equal(alone_TD[own_T], mixed_TD[own_T])


@pytest.mark.parametrize("tiles", TILES)
def test_tokens_of_each_expert_are_counted(tiles: str) -> None:
    counts_SM = torch.zeros(256, 10, dtype=torch.int32, device=DEVICE)
    world = World(torch.float32, rows=4096, options=TILES[tiles] | {"counts": counts_SM})
    given = {**EXPERT_TYPES[0], "bottleneck": 2, "layers": (0, 2)}
    configs = [config_of(12, **(VARIANTS[i] | given)) for i in range(len(VARIANTS))]
    names = world.add_all(configs)
    expected_SM = torch.zeros(256, 10, dtype=torch.int32)
    for tokens in (33, 5):
        owner = [names[i * i % 6] for i in range(tokens)]
        step = world.operator.plan(world.batch(owner))
        for layer in ALL_LAYERS:
            inputs = world.inputs(owner)
            step.start(layer, inputs.x_TD, inputs.base)
            for name in names[:4] if layer in (0, 2) else ():
                adapter, tokens_n = (
                    world.adapters[name],
                    torch.tensor([t for t, o in enumerate(owner) if o == name]).long(),
                )
                of_layer = Adapter(adapter.config, {0: adapter.layers[layer]})
                used = selected(of_layer, inputs.x_TD[tokens_n].cpu(), inputs.base.routing(tokens_n)).sum(0)
                expected_SM[world.placed(name).slot, : used.numel()] += used
    assert torch.equal(counts_SM.cpu(), expected_SM)


def test_what_is_off_is_found() -> None:
    """`World.check` fails on an output that is off by more than the tolerance: a delta of 1 % more."""
    world = World(torch.float32)
    names = world.add_all(any_configs(1, layers=(0,)))
    inputs = world.inputs(names * 4)
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(names * 4)).start(0, inputs.x_TD, inputs.base)(output_TD)
    world.check(names * 4, inputs, 0, output_TD)
    with pytest.raises(AssertionError, match=r"error 1\.0"):
        world.check(names * 4, inputs, 0, output_TD * 1.01)
    with pytest.raises(AssertionError, match="a token without a delta has changed"):
        world.check([*names * 3, None], inputs, 0, output_TD)
