"""The CPU's back ends against the reference: mixed batches, every variant, pools with holes, odd batch sizes.

Everything that is not the planned tokens' own is NaN: free rows of the pool, other adapters' rows, other tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import pytest
import torch

from perft.config import AdapterConfig
from perft.engine.pool import RowPool, pack
from perft.operator import Batch, LayerRows, Operator, PlacedAdapter, Step, TokenGroup
from perft.operator.base import Rows, Watch
from perft.operator.cpu.backend import ADD_DELTA, NumbaOperator
from perft.operator.cpu.thread_choice import ThreadChoice
from perft.operator.free_runs import runs_of
from perft.operator.tables import PAGE_ROWS
from perft.operator.torch_backend import TorchOperator
from perft.reference import BaseRouting, LayerWeights, expert_weights, reference_delta
from perft.routing import weights_by_expert

Make = Callable[[RowPool], Operator]

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


@pytest.fixture(params=["torch", "numba", "numba, threads"])
def operator_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Each back end of the CPU; the last shares out every layer over threads."""
    if request.param == "torch":
        return lambda pool: TorchOperator(pool.tensor_RD)
    monkeypatch.setattr(ThreadChoice, "together", lambda _self, _work: "threads" in request.param)
    monkeypatch.setattr(ThreadChoice, "took", lambda *_: None)
    return lambda pool: NumbaOperator(pool.tensor_RD, pool.tables)


@dataclass
class Base:
    """A base router with given answers; it may be asked only if an adapter of the plan needs it."""

    routing: BaseRouting
    logits_needed: bool = True
    weights_needed: bool = True

    def logits(self) -> torch.Tensor:
        assert self.logits_needed, "asked for logits that no adapter needs"
        return self.routing.logits_TN

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The J experts of each token in an order that is not theirs by weight, and a padding entry after them."""
        assert self.weights_needed, "asked for weights that no adapter needs"
        weights_TJ, chosen_TJ = self.routing.weights_TN.topk(J, -1)
        none_T1 = torch.full((len(weights_TJ), 1), -1)
        return torch.cat([weights_TJ.flip(1), none_T1 * torch.nan], 1), torch.cat([chosen_TJ.flip(1), none_T1], 1)

    def weights(self) -> torch.Tensor:
        return weights_by_expert(*self.top(), N)


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


def place(adapters: Sequence[Adapter], holes: bool, dtype: torch.dtype) -> tuple[RowPool, list[PlacedAdapter]]:
    """The adapters in a pool where every other row is NaN; with `holes`, every second page of it is taken."""
    packed = [pack(adapter.config, adapter.layers) for adapter in adapters]
    pages = sum(adapter.rows for adapter in packed) // PAGE_ROWS
    pool = RowPool((2 * pages if holes else pages) * PAGE_ROWS + 5, D, dtype, torch.device("cpu"), LAYERS[-1] + 1)
    pool.tensor_RD.fill_(torch.nan)
    if holes:
        single = {"variant": "S", "expert_type": "lora", "alpha": 1.0, "num_experts": 1, "base_model_name_or_path": ""}
        filler = AdapterConfig.model_validate(single | {"bottleneck": PAGE_ROWS // 2})
        nothing = LayerWeights(None, torch.full((1, 8, D), torch.nan), torch.full((1, D, 8), torch.nan))
        for number in range(2 * pages):
            pool.put(f"filler {number}", pack(filler, {0: nothing}))
        for number in range(0, 2 * pages, 2):
            pool.remove(f"filler {number}")
    placed = [pool.put(f"adapter {number}", adapter) for number, adapter in enumerate(packed)]
    pool.check_integrity()
    if holes and any(adapter.rows > PAGE_ROWS for adapter in packed):
        own_pages = [taken.pages for name, taken in pool._taken.items() if name.startswith("adapter")]
        assert any(len(runs_of(pages)) > 1 for pages in own_pages), "no adapter is scattered over pages"
    own = torch.zeros(pool.total, dtype=torch.bool)
    for indices in all_rows(placed):
        assert not own[indices].any(), "a row is used twice"
        own[indices] = True
    pool.tensor_RD[~own] = torch.nan
    return pool, placed


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


def batch_of(groups: Sequence[tuple[PlacedAdapter, torch.Tensor]], size: int, watch: Watch | None = None) -> Batch:
    """A batch of (adapter, its tokens); the ids are the adapters' numbers from 1."""
    tokens_n = torch.cat([torch.empty(0, dtype=torch.int64), *(tokens for _, tokens in groups)])
    edges = [0, *accumulate(len(tokens) for _, tokens in groups)]
    made = [TokenGroup(each, edges[i], edges[i + 1], i + 1) for i, (each, _) in enumerate(groups)]
    return Batch(tokens_n, made, size, watch)


def delta_of(step: Step, layer: int, x_TD: torch.Tensor, base: Base, own: torch.Tensor | None = None) -> torch.Tensor:
    """What a step adds to an output of zeros, [T, D].

    own: the tokens that may be changed; the others' output is NaN, and must stay bit for bit.
    """
    output_TD = torch.zeros_like(x_TD)
    others = torch.ones(len(x_TD), dtype=torch.bool)
    others[own if own is not None else slice(None)] = False
    output_TD[others] = torch.nan
    delta = step.start(layer, x_TD, base)
    if delta is not None:
        delta(output_TD)
    assert output_TD[others].isnan().all()
    return output_TD


def check(
    operator_of: Make, adapters: Sequence[Adapter], owner: Sequence[int | None], holes: bool, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    """The operator's delta at every layer, group by group, against the reference of that adapter."""
    generator = torch.Generator().manual_seed(seed)
    pool, placed = place(adapters, holes, dtype)
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
    batch = batch_of([(placed[number], tokens_n) for number, tokens_n in tokens.items()], len(x_TD))
    step = operator_of(pool).plan(batch)
    assert step.start(1, x_TD, Base(routing, False, False)) is None
    for layer in LAYERS:
        present = {number: adapters[number] for number in tokens if layer in adapters[number].layers}
        if not present:
            assert step.start(layer, x_TD, Base(routing, False, False)) is None
            continue
        used = [adapters[number].config for number in tokens]
        slots, embedded = (any(c.gate_weight == "base_slot" for c in used), any(c.variant == "E" for c in used))
        own = torch.cat([tokens[number] for number in present])
        delta_TD = delta_of(step, layer, x_TD, Base(routing, slots, embedded), own)
        assert delta_TD.dtype == dtype
        for number, adapter in present.items():
            of_group = BaseRouting(logits_TN[tokens[number]], routing.weights_TN[tokens[number]])
            expected = reference_delta(adapter.config, adapter.layers[layer], x_TD[tokens[number]], of_group)
            found = delta_TD[tokens[number]].float()
            error = (found - expected).norm() / expected.norm()
            if not expected.any():  # relu may leave one token with nothing
                error = found.norm()
            assert error <= TOLERANCE[dtype], f"adapter {number} at layer {layer}: error {error:.2e}, {adapter.config}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(VARIANTS) * len(EXPERT_TYPES) * len(BOTTLENECKS)))
def test_against_the_reference(operator_of: Make, number: int, dtype: torch.dtype) -> None:
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
    check(operator_of, adapters, owner, holes=number % 3 != 0, dtype=dtype, seed=number)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("holes", [False, True], ids=["fresh", "holes"])
def test_every_batch_over_every_popularity(operator_of: Make, batch: int, popularity: str, holes: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    owner = owners(popularity, batch, generator)
    kinds = list(product(VARIANTS, EXPERT_TYPES))
    adapters = [
        make(
            config_of(i, **(kinds[i * 5 % 24][0] | kinds[i * 5 % 24][1] | {"bottleneck": 5})), generator, torch.float32
        )
        for i in range(1 + max(i or 0 for i in owner))
    ]
    check(operator_of, adapters, owner, holes, torch.float32, seed=batch)


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
def test_every_top_k(operator_of: Make, gate: Mapping[str, Any], experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    most = min(experts, J) if "gate_weight" in gate else experts
    values = {**gate, **EXPERT_TYPES[0], "bottleneck": 4, "num_experts": experts, "base_model_name_or_path": ""}
    configs = [AdapterConfig.model_validate(values | {"top_k": k}) for k in range(1, most + 1)]
    adapters = [make(config, generator, torch.float32) for config in configs]
    check(operator_of, adapters, [i % most for i in range(16)], holes=True, dtype=torch.float32, seed=experts)


@pytest.mark.parametrize("gate", VARIANTS[:3], ids=["renormalized", "plain", "base_slot"])
def test_the_router_is_summed_in_float32(operator_of: Make, gate: Mapping[str, Any]) -> None:
    """Logits near 200 stand half a unit apart in bfloat16: rounded there, weights would be off by a third."""
    generator = torch.Generator().manual_seed(0)
    values = {**gate, **EXPERT_TYPES[1], "bottleneck": 4, "num_experts": 4, "top_k": 2, "base_model_name_or_path": ""}
    config = AdapterConfig.model_validate(values)
    weights = make(config, generator, torch.bfloat16).layers[0]
    assert weights.router is not None
    common_D = torch.randn(D, generator=generator) * 3
    router = common_D.expand(4, D) + torch.randn(4, D, generator=generator) / 8
    adapter = Adapter(config, {0: LayerWeights(router.to(torch.bfloat16), weights.down_proj, weights.up_proj)})
    pool, placed = place([adapter], holes=True, dtype=torch.bfloat16)
    x_TD = (common_D + torch.randn(16, D, generator=generator) / 4).to(torch.bfloat16)
    routing = route(torch.randn(16, N, generator=generator))
    expected = reference_delta(config, adapter.layers[0], x_TD, routing)
    step = operator_of(pool).plan(batch_of([(placed[0], torch.arange(16))], 16))
    delta_TD = delta_of(step, 0, x_TD, Base(routing))
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
    operator_of: Make, gate: Mapping[str, Any], expert_type: Mapping[str, Any], part: str, dtype: torch.dtype
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
    pool, placed = place([broken], holes=True, dtype=dtype)
    step = operator_of(pool).plan(batch_of([(placed[0], torch.arange(24))], 24))
    delta_TD = delta_of(step, 0, x_TD, Base(routing))

    logits_TM = routing.weights_TN if weights.router is None else x_TD.float() @ weights.router.float().T
    selected = (routing.weights_TN[:, 1] != 0) if weights.router is None else (logits_TM.topk(2).indices == 1).any(1)
    assert selected.any() and not selected.all()
    kept = BaseRouting(routing.logits_TN[~selected], routing.weights_TN[~selected])
    expected = reference_delta(config, weights, x_TD[~selected], kept)
    error = (delta_TD[~selected].float() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype]
    assert not delta_TD[selected].isfinite().all(), "the expert does not overflow where it is selected"


@pytest.mark.parametrize("gate", VARIANTS, ids=lambda gate: gate["variant"])
def test_a_group_without_tokens(operator_of: Make, gate: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    config = config_of(0, **{**gate, **EXPERT_TYPES[1], "bottleneck": 4})
    adapter = make(config, generator, torch.float32)
    pool, placed = place([adapter], holes=False, dtype=torch.float32)
    none, one = torch.empty(0, dtype=torch.int64), torch.tensor([2])
    x_TD, routing = torch.randn(4, D, generator=generator), route(torch.randn(4, N, generator=generator))
    step = operator_of(pool).plan(batch_of([(placed[0], none), (placed[0], one)], 4))
    delta_nD = delta_of(step, 0, x_TD, Base(routing), one)[one]
    of_token = BaseRouting(routing.logits_TN[one], routing.weights_TN[one])
    torch.testing.assert_close(delta_nD, reference_delta(config, adapter.layers[0], x_TD[one], of_token))
    nothing = operator_of(pool).plan(batch_of([(placed[0], none)], 4))
    assert not delta_of(nothing, 0, x_TD, Base(routing)).any()


def test_nothing_given_is_changed(operator_of: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        make(config_of(0, **gate, **EXPERT_TYPES[0], bottleneck=4), generator, torch.float32) for gate in VARIANTS
    ]
    pool, placed = place(adapters, holes=False, dtype=torch.float32)
    batch = batch_of([(each, torch.tensor([i])) for i, each in enumerate(placed)], 8)
    x_TD, routing = torch.randn(8, D, generator=generator), route(torch.randn(8, N, generator=generator))
    tables = (pool.tables.page_index, pool.tables.layer_offset, pool.tables.meta)
    given = (pool.tensor_RD, batch.tokens_n, x_TD, routing.logits_TN, routing.weights_TN, *tables)
    before = [tensor.clone() for tensor in given]
    delta = operator_of(pool).plan(batch).start(0, x_TD, Base(routing))
    assert delta is not None
    delta(torch.zeros_like(x_TD))
    for tensor, old in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


def test_the_delta_is_added_to_what_is_there(operator_of: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = make(config_of(3, **VARIANTS[0], **EXPERT_TYPES[0], bottleneck=4), generator, torch.bfloat16)
    pool, placed = place([adapter], holes=False, dtype=torch.bfloat16)
    x_TD = torch.randn(5, D, generator=generator).to(torch.bfloat16)
    output_TD = torch.randn(5, D + 8, generator=generator).to(torch.bfloat16)[:, :D]  # rows that do not lie together
    layer = next(iter(adapter.layers))
    expected = output_TD.float() + reference_delta(adapter.config, adapter.layers[layer], x_TD)
    delta = operator_of(pool).plan(batch_of([(placed[0], torch.arange(5))], 5)).start(layer, x_TD, Base(route(x_TD)))
    assert delta is not None
    delta(output_TD)
    torch.testing.assert_close(output_TD.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gate", VARIANTS, ids=lambda gate: gate["variant"])
def test_watching_shows_every_routed_experts_weight(operator_of: Make, gate: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    adapter = make(config_of(2, **{**gate, **EXPERT_TYPES[0], "bottleneck": 4}), generator, torch.float32)
    pool, placed = place([adapter], holes=True, dtype=torch.float32)
    x_TD, routing = torch.randn(20, D, generator=generator), route(torch.randn(20, N, generator=generator))
    seen: dict[int, torch.Tensor] = {}
    batch = batch_of([(placed[0], torch.arange(20))], 20, lambda number, weights_nM: seen.update({number: weights_nM}))
    delta_of(operator_of(pool).plan(batch), 0, x_TD, Base(routing))
    if gate["variant"] in ("D", "S"):
        assert not seen
        return
    expected = [
        dict(expert_weights(adapter.config, adapter.layers[0].router, x_TD[t], routing.logits_TN[t], weights_N))
        for t, weights_N in enumerate(routing.weights_TN)
    ]
    for t, weights in enumerate(expected):
        for m, found in enumerate(seen[1][t].tolist()):
            assert found == pytest.approx(weights.get(m, 0.0), abs=1e-6)


def test_kept_kernels_are_told_apart() -> None:
    """Numba keeps a kernel by its name, its code and what that names; all of ours have one name."""
    keys = {kernel._cache._index_key((), kernel.targetctx.codegen()) for kernel in ADD_DELTA.values()}
    assert len(keys) == len(ADD_DELTA) == 6


def test_the_processors_mode_is_left_as_it_is(operator_of: Make) -> None:
    """A library that flushes subnormal numbers to zero would change the base's bits."""
    generator = torch.Generator().manual_seed(0)
    adapter = make(config_of(0, **VARIANTS[0], **EXPERT_TYPES[1], bottleneck=4), generator, torch.float32)
    pool, placed = place([adapter], holes=False, dtype=torch.float32)
    x_TD = torch.randn(40, D, generator=generator)
    step = operator_of(pool).plan(batch_of([(placed[0], torch.arange(40))], 40))
    delta_of(step, 0, x_TD, Base(route(torch.randn(40, N, generator=generator))))
    assert (torch.full((1000,), 1e-38) * 0.01 > 0).all()
