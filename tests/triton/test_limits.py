"""What the back end refuses, by name, and what it promises to have compiled before the first request."""

from typing import Any

import pytest
import torch

from perft.operator.base import Batch
from tests.triton.recorder import recorded
from tests.triton.worlds import EXPERT_TYPES, VARIANTS, J, N, World, any_configs, config_of, owners

SOME = {**EXPERT_TYPES[0], "bottleneck": 4}


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({"width": 24}, {**VARIANTS[4], "num_experts": 9}, "9 experts of bottleneck 4, expected at most 32 columns"),
        ({"max_experts": 3}, {**VARIANTS[0], "num_experts": 4}, "4 experts, expected at most 3 of variant R"),
        ({"base_top_k": 0}, VARIANTS[3], "variant E, .* this base does not give its top-k"),
        ({"has_logits": False}, VARIANTS[2], "base_slot, .* this base does not give its logits"),
    ],
    ids=["columns", "experts", "embedded", "base_slot"],
)  # fmt: skip
def test_an_adapter_that_the_buffers_were_not_made_for(
    options: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    world = World(torch.float32, options=options)
    names = world.add_all([config_of(3, **given, **SOME)])
    with pytest.raises(ValueError, match=said):
        world.operator.plan(world.batch(names))


@pytest.mark.parametrize(("tokens", "adapters"), [(129, 1), (41, 41)])
def test_a_step_that_the_buffers_were_not_made_for(tokens: int, adapters: int) -> None:
    world = World(torch.float32, rows=8192)
    names = world.add_all(any_configs(adapters, bottleneck=1))
    with pytest.raises(ValueError, match=f"{tokens} tokens and {adapters} adapters, expected at most 128 and 40"):
        world.operator.plan(world.batch([names[i % adapters] for i in range(tokens)]))


@pytest.mark.parametrize(("planned", "given"), [(8, 7), (64, 65)], ids=["fewer", "of other tiles"])
def test_more_or_fewer_tokens_than_were_planned(planned: int, given: int) -> None:
    world = World(torch.float32, options={"decode_tokens": 64})
    names = world.add_all(any_configs(1))
    step = world.operator.plan(world.batch(names * planned))
    inputs = world.inputs(names * given)
    with pytest.raises(ValueError, match=f"{given} tokens in a step that was planned for {planned}"):
        step.start(0, inputs.x_TD, inputs.base)


def test_the_tiles_of_a_size_hold_every_batch_of_it() -> None:
    """However the tokens fall on adapters, the grid of their number is enough; and one fewer would not be."""
    world = World(torch.float32, options={"max_groups": 5, "decode_tokens": 64})
    for tokens in range(1, 129):
        tile = world.operator.tiling(tokens).tile
        groups = min(5, tokens)
        ones = [1] * (groups - 1)
        most = max(
            sum(-(-size // tile) for size in (*ones[: groups - 1 - full], *[tile + 1] * full, rest))
            for full in range(groups)
            if (rest := tokens - (groups - 1 - full) - full * (tile + 1)) > 0
        )
        assert most <= world.operator.tiles(tokens) <= most + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gives", [{}, {"base_top_k": 0}, {"has_logits": False}], ids=["all", "no top-k", "no logits"])
def test_warming_up_launches_every_variant_and_changes_nothing(dtype: torch.dtype, gives: dict[str, Any]) -> None:
    world = World(dtype, options={"decode_tokens": 32} | gives)
    names = world.add_all(any_configs(1))
    pool_RD = world.pool.tensor_RD.clone()
    with recorded() as warming:
        world.operator.warm_up()
    torch.testing.assert_close(world.pool.tensor_RD, pool_RD, rtol=0, atol=0, equal_nan=True)
    with recorded() as serving:
        for tokens in (1, 32, 33):
            step = world.operator.plan(world.batch(owners("one", tokens, names, world.generator)))
            for number in range(8):
                ids, weights, logits = (bool(number & bit) for bit in (1, 2, 4))
                inputs = world.inputs(names * tokens, torch.int64 if ids else torch.int32)
                inputs.base.weights_TJ = inputs.base.weights_TJ.to(dtype if weights else torch.float32)
                inputs.base.logits_TN = inputs.base.logits_TN.to(dtype if logits else torch.float32)
                step.start(1, inputs.x_TD, inputs.base)(inputs.output_TD)
    assert serving.variants() == warming.variants()


def test_a_base_that_gives_nothing_is_asked_for_nothing() -> None:
    class Silent:
        def logits(self) -> torch.Tensor:
            raise AssertionError

        top = weights = logits

    world = World(torch.float32, options={"base_top_k": 0, "has_logits": False})
    names = world.add_all(any_configs(1))
    inputs = world.inputs(names * 2)
    output_TD = inputs.output_TD.clone()
    world.operator.plan(world.batch(names * 2)).start(2, inputs.x_TD, Silent())(output_TD)
    world.check(names * 2, inputs, 2, output_TD)


def test_a_step_of_no_tokens() -> None:
    world = World(torch.float32)
    step = world.operator.plan(Batch(torch.empty(0, dtype=torch.int64), (), 0))
    inputs = world.inputs([])
    assert inputs.base.logits_TN.shape == (0, N) and inputs.base.ids_TJ.shape == (0, J)
    step.start(0, inputs.x_TD, inputs.base)(inputs.output_TD)
