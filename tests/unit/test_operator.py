"""The torch back end against the reference: mixed batches, every variant, pools with holes, odd batch sizes.

Everything that is not the planned tokens' own is NaN: free rows of the pool, other adapters' rows, other tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from perft.config import AdapterConfig
from perft.engine.pool import RowPool, pack
from perft.operator import LayerRows, PlacedAdapter, TokenGroup, TorchOperator
from perft.operator.base import BatchPlan, Rows
from perft.reference import BaseRouting, LayerWeights, reference_delta

D, N, J = 24, 6, 3  # hidden size, base experts, base experts a token uses
LAYERS = (0, 2)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

VARIANTS: tuple[dict[str, Any], ...] = (
    {"variant": "R", "renormalize": True},
    {"variant": "R", "renormalize": False},
    {"variant": "R", "renormalize": False, "gate_weight": "base_slot"},
    {"variant": "E", "num_experts": N},
    {"variant": "D"},
    {"variant": "S", "num_experts": 1},
)
EXPERT_TYPES: tuple[dict[str, Any], ...] = (
    {"expert_type": "lora", "alpha": 7.0},
    *({"expert_type": "parallel", "activation": activation} for activation in ("silu", "relu", "gelu")),
)
BOTTLENECKS = (1, 3, 16, 64)
BATCHES = (1, 2, 7, 33)
POPULARITY = ("one", "different", "uniform", "skewed", "some without")


@dataclass
class Base:
    """A base router with given answers; it may be asked only if an adapter of the plan needs it."""

    routing: BaseRouting
    logits_needed: bool = True
    weights_needed: bool = True

    def logits(self) -> torch.Tensor:
        assert self.logits_needed, "asked for logits that no adapter needs"
        return self.routing.logits_TN

    def weights(self) -> torch.Tensor:
        assert self.weights_needed, "asked for weights that no adapter needs"
        return self.routing.weights_TN


@dataclass(frozen=True)
class Adapter:
    """An adapter of the test: its configuration and its tensors, in the pool's dtype."""

    config: AdapterConfig
    layers: dict[int, LayerWeights]


def config_of(number: int, **given: Any) -> AdapterConfig:
    """`given`, with what it leaves open chosen by `number`: experts 1..7, top-k 1..M, which layers."""
    values: dict[str, Any] = {"base_model_name_or_path": "b", "num_experts": 1 + number % 7} | given
    if values["variant"] == "R":
        most = J if values.get("gate_weight") == "base_slot" else values["num_experts"]
        values["top_k"] = 1 + number // 7 % min(most, values["num_experts"])
    values["layers"] = (None, LAYERS[:1], None, LAYERS[1:], LAYERS)[number % 5]
    return AdapterConfig.model_validate(values)


def make(config: AdapterConfig, generator: torch.Generator, dtype: torch.dtype) -> Adapter:
    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).div(float(shape[-1]) ** 0.5).to(dtype)

    layers = config.layer_indices(LAYERS)
    tensors = {name: tensor(shape) for name, shape in config.tensor_shapes(layers, D).items()}
    weights = {
        i: LayerWeights(
            tensors.get(f"layers.{i}.router"), tensors[f"layers.{i}.down_proj"], tensors[f"layers.{i}.up_proj"]
        )
        for i in layers
    }
    return Adapter(config, weights)


def route(logits_TN: torch.Tensor) -> BaseRouting:
    """What a base with top-k J says, renormalised (Mixtral)."""
    top_TJ, chosen_TJ = torch.softmax(logits_TN, -1).topk(J, -1)
    weights_TN = torch.zeros_like(logits_TN).scatter(1, chosen_TJ, top_TJ / top_TJ.sum(-1, keepdim=True))
    return BaseRouting(logits_TN, weights_TN)


def place(adapters: Sequence[Adapter], holes: bool, dtype: torch.dtype) -> tuple[torch.Tensor, list[PlacedAdapter]]:
    """The adapters in a pool where every other row is NaN; with `holes`, after fillers came and every second left."""
    packed = [pack(adapter.config, adapter.layers) for adapter in adapters]
    rows = sum(adapter.rows for adapter in packed)
    largest = max(block.shape[0] for adapter in packed for block in adapter.blocks.values())
    hole = 2 * max(1, largest // 6)  # a filler is one S adapter at one layer: 2 * bottleneck rows
    count = -(-rows // hole)
    pool = RowPool(2 * count * hole if holes else rows + 5, D, dtype, torch.device("cpu"))
    pool.tensor_RD.fill_(torch.nan)
    if holes:
        single = {"variant": "S", "expert_type": "lora", "alpha": 1.0, "num_experts": 1, "base_model_name_or_path": ""}
        filler = AdapterConfig.model_validate(single | {"bottleneck": hole // 2})
        nothing = LayerWeights(None, torch.full((1, hole // 2, D), torch.nan), torch.full((1, D, hole // 2), torch.nan))
        for number in range(2 * count):
            pool.put(f"filler {number}", pack(filler, {0: nothing}))
        for number in range(0, 2 * count, 2):
            pool.remove(f"filler {number}")
    placed = [pool.put(f"adapter {number}", adapter) for number, adapter in enumerate(packed)]
    pool.check_integrity()
    if holes and largest > hole:
        assert any(isinstance(rows, torch.Tensor) for rows in all_rows(placed)), "no adapter is scattered over runs"
    own = torch.zeros(pool.total, dtype=torch.bool)
    for indices in all_rows(placed):
        assert not own[indices].any(), "a row is used twice"
        own[indices] = True
    pool.tensor_RD[~own] = torch.nan
    return pool.tensor_RD, placed


def all_rows(placed: Sequence[PlacedAdapter]) -> list[Rows]:
    every: list[LayerRows] = [rows for adapter in placed for rows in adapter.layers.values()]
    return [part for rows in every for part in (rows.router, rows.down, rows.up) if part is not None]


def owners(popularity: str, tokens: int, generator: torch.Generator) -> list[int | None]:
    """Which adapter each token uses. Token 0 always uses adapter 0."""

    def draw(choices: Sequence[int | None]) -> list[int | None]:
        return [choices[int(i)] for i in torch.randint(len(choices), (tokens - 1,), generator=generator)]

    match popularity:
        case "one":
            return [0] * tokens
        case "different":
            return list(range(tokens))
        case "uniform":
            return [0, *draw((0, 1, 2, 3))]
        case "skewed":
            return [0, *draw((0,) * 12 + (1, 1, 2))]
        case _:
            return [0, *draw((None, None, 0, 1, 2))]


def check(adapters: Sequence[Adapter], owner: Sequence[int | None], holes: bool, dtype: torch.dtype, seed: int) -> None:
    """The operator's delta at every layer, group by group, against the reference of that adapter."""
    generator = torch.Generator().manual_seed(seed)
    pool_RD, placed = place(adapters, holes, dtype)
    where = torch.randperm(len(owner) + 3, generator=generator)[: len(owner)]  # x has more rows than the plan
    planned = where[torch.tensor([number is not None for number in owner])]
    x_TD = torch.full((len(owner) + 3, D), torch.nan, dtype=dtype)
    logits_TN = torch.full((len(owner) + 3, N), torch.nan)
    x_TD[planned] = torch.randn(len(planned), D, generator=generator).to(dtype)
    logits_TN[planned] = torch.randn(len(planned), N, generator=generator) * 2
    routing = route(logits_TN)
    tokens = {
        number: where[torch.tensor([other == number for other in owner])]
        for number in sorted({number for number in owner if number is not None}, reverse=True)
    }
    plan = BatchPlan([TokenGroup(placed[number], tokens_n) for number, tokens_n in tokens.items()])
    assert plan.at(1) is None
    for layer in LAYERS:
        present = {number: adapters[number] for number in tokens if layer in adapters[number].layers}
        layer_plan = plan.at(layer)
        assert (layer_plan is None) == (not present)
        if layer_plan is None:
            continue
        assert sorted(layer_plan.tokens_n.tolist()) == sorted(t for number in present for t in tokens[number].tolist())
        used = [adapter.config for adapter in present.values()]
        slots, embedded = (any(c.gate_weight == "base_slot" for c in used), any(c.variant == "E" for c in used))
        delta_nD = TorchOperator().delta(pool_RD, layer_plan, x_TD, Base(routing, slots, embedded))
        assert delta_nD.shape == (layer_plan.tokens_n.numel(), D) and delta_nD.dtype == dtype
        row_of = {token: row for row, token in enumerate(layer_plan.tokens_n.tolist())}
        for number, adapter in present.items():
            rows = [row_of[token] for token in tokens[number].tolist()]
            of_group = BaseRouting(logits_TN[tokens[number]], routing.weights_TN[tokens[number]])
            expected = reference_delta(adapter.config, adapter.layers[layer], x_TD[tokens[number]], of_group)
            error = (delta_nD[rows].float() - expected).norm() / expected.norm()
            if not expected.any():  # relu may leave one token with nothing
                error = delta_nD[rows].float().norm()
            assert error <= TOLERANCE[dtype], f"adapter {number} at layer {layer}: error {error:.2e}, {adapter.config}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(VARIANTS) * len(EXPERT_TYPES) * len(BOTTLENECKS)))
def test_against_the_reference(number: int, dtype: torch.dtype) -> None:
    """Every variant x expert type x bottleneck; batch, popularity, holes, experts and layers vary along with them."""
    variant, expert_type, bottleneck = list(product(VARIANTS, EXPERT_TYPES, BOTTLENECKS))[number]
    batch, popularity = list(product(BATCHES, POPULARITY))[number * 7 % 20]
    generator = torch.Generator().manual_seed(number)
    main = config_of(number // 4 + number // 16, **(variant | expert_type | {"bottleneck": bottleneck}))
    owner = owners(popularity, batch, generator)
    others = [
        config_of(i * 3, **(VARIANTS[i % 6] | EXPERT_TYPES[i % 4] | {"bottleneck": BOTTLENECKS[i % 3]}))
        for i in range(number + 1, number + 1 + max(i or 0 for i in owner))
    ]
    adapters = [make(config, generator, dtype) for config in (main, *others)]
    check(adapters, owner, holes=number % 3 != 0, dtype=dtype, seed=number)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("holes", [False, True], ids=["fresh", "holes"])
def test_every_batch_over_every_popularity(batch: int, popularity: str, holes: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    owner = owners(popularity, batch, generator)
    kinds = list(product(VARIANTS, EXPERT_TYPES))
    adapters = [
        make(
            config_of(i, **(kinds[i * 5 % 24][0] | kinds[i * 5 % 24][1] | {"bottleneck": 5})), generator, torch.float32
        )
        for i in range(1 + max(i or 0 for i in owner))
    ]
    check(adapters, owner, holes, torch.float32, seed=batch)


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
def test_every_top_k(gate: Mapping[str, Any], experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    most = min(experts, J) if "gate_weight" in gate else experts
    values = {**gate, **EXPERT_TYPES[0], "bottleneck": 4, "num_experts": experts, "base_model_name_or_path": ""}
    configs = [AdapterConfig.model_validate(values | {"top_k": k}) for k in range(1, most + 1)]
    adapters = [make(config, generator, torch.float32) for config in configs]
    check(adapters, [i % most for i in range(16)], holes=True, dtype=torch.float32, seed=experts)


@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
def test_the_router_is_summed_in_float32(gate: Mapping[str, Any]) -> None:
    """Logits near 200 stand half a unit apart in bfloat16: rounded there, weights would be off by a third."""
    generator = torch.Generator().manual_seed(0)
    values = {**gate, **EXPERT_TYPES[1], "bottleneck": 4, "num_experts": 4, "top_k": 2, "base_model_name_or_path": ""}
    config = AdapterConfig.model_validate(values)
    weights = make(config, generator, torch.bfloat16).layers[0]
    assert weights.router is not None
    common_D = torch.randn(D, generator=generator) * 3
    router = common_D.expand(4, D) + torch.randn(4, D, generator=generator) / 8
    adapter = Adapter(config, {0: LayerWeights(router.to(torch.bfloat16), weights.down_proj, weights.up_proj)})
    pool_RD, placed = place([adapter], holes=True, dtype=torch.bfloat16)
    plan = BatchPlan([TokenGroup(placed[0], torch.arange(16))]).at(0)
    assert plan is not None
    x_TD = (common_D + torch.randn(16, D, generator=generator) / 4).to(torch.bfloat16)
    routing = route(torch.randn(16, N, generator=generator))
    expected = reference_delta(config, adapter.layers[0], x_TD, routing)
    delta_TD = TorchOperator().delta(pool_RD, plan, x_TD, Base(routing))
    assert (delta_TD.float() - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()


def huge(weights: LayerWeights, expert: int, part: str, scale: float) -> LayerWeights:
    """`weights`, with one expert whose output is infinite or NaN for nearly every x; finite after `scale` (FORMAT)."""
    changed = {"down_proj": weights.down_proj.clone(), "up_proj": weights.up_proj.clone()}
    changed[part][expert] = 0.9 * torch.finfo(weights.up_proj.dtype).max / max(scale, 1.0)
    return LayerWeights(weights.router, **changed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", ["down_proj", "up_proj"])
@pytest.mark.parametrize("expert_type", EXPERT_TYPES, ids=["lora", "silu", "relu", "gelu"])
@pytest.mark.parametrize("gate", VARIANTS[:4], ids=["renormalized", "plain", "base_slot", "embedded"])
def test_an_expert_that_overflows_reaches_only_the_tokens_that_selected_it(
    gate: Mapping[str, Any], expert_type: Mapping[str, Any], part: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    routed = {} if gate["variant"] == "E" else {"num_experts": N, "top_k": 2}
    config = AdapterConfig.model_validate(
        {**gate, **expert_type, **routed, "bottleneck": 4, "base_model_name_or_path": ""}
    )
    weights = make(config, generator, dtype).layers[0]
    x_TD = (torch.randn(24, D, generator=generator) * 10).to(dtype)
    routing = route(torch.randn(24, N, generator=generator) * 2)
    broken = Adapter(config, {0: huge(weights, 1, part, config.scale)})
    pool_RD, placed = place([broken], holes=True, dtype=dtype)
    plan = BatchPlan([TokenGroup(placed[0], torch.arange(24))]).at(0)
    assert plan is not None
    delta_TD = TorchOperator().delta(pool_RD, plan, x_TD, Base(routing))

    logits_TM = routing.weights_TN if weights.router is None else x_TD.float() @ weights.router.float().T
    selected = (routing.weights_TN[:, 1] != 0) if weights.router is None else (logits_TM.topk(2).indices == 1).any(1)
    assert selected.any() and not selected.all()
    kept = BaseRouting(routing.logits_TN[~selected], routing.weights_TN[~selected])
    expected = reference_delta(config, weights, x_TD[~selected], kept)
    error = (delta_TD[~selected].float() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype]
    assert not delta_TD[selected].isfinite().all(), "the expert does not overflow where it is selected"


@pytest.mark.parametrize("gate", VARIANTS, ids=lambda gate: gate["variant"])
def test_a_group_without_tokens(gate: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    config = config_of(0, **{**gate, **EXPERT_TYPES[1], "bottleneck": 4})
    adapter = make(config, generator, torch.float32)
    pool_RD, placed = place([adapter], holes=False, dtype=torch.float32)
    none, one = torch.empty(0, dtype=torch.int64), torch.tensor([2])
    plan = BatchPlan([TokenGroup(placed[0], none), TokenGroup(placed[0], one)]).at(0)
    assert plan is not None
    x_TD, routing = torch.randn(4, D, generator=generator), route(torch.randn(4, N, generator=generator))
    delta_nD = TorchOperator().delta(pool_RD, plan, x_TD, Base(routing))
    of_token = BaseRouting(routing.logits_TN[one], routing.weights_TN[one])
    torch.testing.assert_close(delta_nD, reference_delta(config, adapter.layers[0], x_TD[one], of_token))


def test_nothing_given_is_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        make(config_of(0, **gate, **EXPERT_TYPES[0], bottleneck=4), generator, torch.float32) for gate in VARIANTS
    ]
    pool_RD, placed = place(adapters, holes=False, dtype=torch.float32)
    plan = BatchPlan([TokenGroup(each, torch.tensor([i])) for i, each in enumerate(placed)]).at(0)
    assert plan is not None
    x_TD, routing = torch.randn(8, D, generator=generator), route(torch.randn(8, N, generator=generator))
    given = (pool_RD, plan.tokens_n, x_TD, routing.logits_TN, routing.weights_TN)
    before = [tensor.clone() for tensor in given]
    TorchOperator().delta(pool_RD, plan, x_TD, Base(routing))
    for tensor, old in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
