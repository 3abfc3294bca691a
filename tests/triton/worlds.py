"""A pool of random adapters, batches over them, and what the reference says of each: for the tests of this folder.

Everything that is not the planned tokens' own is NaN: free rows of the pool, other adapters' rows, other tokens. Tokens
without an adapter must keep the bits of their output.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from perft.config import AdapterConfig
from perft.engine.pool import RowPool, pack
from perft.operator.base import Batch, PlacedAdapter, Rows, TokenGroup
from perft.operator.gpu.backend import TritonOperator
from perft.reference import BaseRouting, LayerWeights, reference_delta
from tests.triton.device import DEVICE

N, J = 6, 3  # base experts, base experts a token uses
LAYERS, ALL_LAYERS = (0, 2), (0, 1, 2)
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
POPULARITY = ("one", "different", "uniform", "skewed", "some without")


@dataclass(frozen=True)
class Adapter:
    """An adapter of the test: its configuration and its tensors, in the pool's dtype."""

    config: AdapterConfig
    layers: dict[int, LayerWeights]


@dataclass
class Base:
    """What a base router says of T tokens; its tensors keep their addresses. ids: -1 where there is none."""

    logits_TN: torch.Tensor
    weights_TJ: torch.Tensor
    ids_TJ: torch.Tensor

    def logits(self) -> torch.Tensor:
        return self.logits_TN

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights_TJ, self.ids_TJ

    def weights(self) -> torch.Tensor:
        raise AssertionError("the back end reads top-k weights, not those by expert")

    def routing(self, tokens_n: torch.Tensor) -> BaseRouting:
        """The same for the reference, of some tokens."""
        logits_nN, weights_nJ, ids_nJ = (
            tensor[tokens_n].cpu() for tensor in (self.logits_TN, self.weights_TJ, self.ids_TJ)
        )
        is_one = ids_nJ >= 0
        weights_nN = torch.zeros(logits_nN.shape).scatter_add(
            1, ids_nJ.clamp_min(0).long(), torch.where(is_one, weights_nJ.float(), 0.0)
        )
        return BaseRouting(logits_nN.float(), weights_nN)


@dataclass
class World:
    """Adapters that can be put into a pool and taken out again, and the operator over it."""

    dtype: torch.dtype
    hidden_size: int = 24
    rows: int = 4096
    holes: bool = True
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.pool = RowPool(self.rows, self.hidden_size, self.dtype, DEVICE, len(ALL_LAYERS))
        self.pool.tensor_RD.fill_(torch.nan)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # the pool copies on a stream of its own
        self.adapters: dict[str, Adapter] = {}
        self.added = 0
        if self.holes:
            self.punch_holes()
        sizes: dict[str, Any] = {"max_tokens": 128, "max_groups": 40, "width": 448, "max_experts": 8}
        given = sizes | {"base_experts": N, "base_top_k": J} | self.options
        self.operator = TritonOperator(self.pool.tensor_RD, self.pool.tables, **given)

    def punch_holes(self) -> None:
        """Leave every second page taken, in the lower half of the pool."""
        single = {"variant": "S", "expert_type": "lora", "alpha": 1.0, "num_experts": 1, "base_model_name_or_path": ""}
        filler = AdapterConfig.model_validate(single | {"bottleneck": 8})
        shape = (1, 8, self.hidden_size)
        nothing = LayerWeights(None, torch.full(shape, torch.nan), torch.full(shape, torch.nan).transpose(1, 2))
        count = self.rows // 32
        for number in range(count):
            self.pool.put(f"filler {number}", pack(filler, {0: nothing}))
        for number in range(0, count, 2):
            self.pool.remove(f"filler {number}")

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        self.pool.put(name, pack(adapter.config, adapter.layers))
        self.pool.check_integrity()

    def add_all(self, configs: Iterable[AdapterConfig]) -> list[str]:
        """Random adapters of these configurations; their names."""
        names = []
        for config in configs:
            names.append(f"adapter {self.added}")
            self.added += 1
            self.add(names[-1], self.make(config))
        return names

    def evict(self, name: str) -> None:
        """Take an adapter out; its rows become NaN."""
        del self.adapters[name]
        for rows in all_rows(self.placed(name)):
            self.pool.tensor_RD[rows] = torch.nan
        self.pool.remove(name)

    def placed(self, name: str) -> PlacedAdapter:
        placed = self.pool.get(name)
        assert placed is not None
        return placed

    def make(self, config: AdapterConfig) -> Adapter:
        layers = config.layer_indices(LAYERS)
        tensors = {
            name: torch.randn(shape, generator=self.generator).div(float(shape[-1]) ** 0.5).to(self.dtype)
            for name, shape in config.tensor_shapes(layers, self.hidden_size).items()
        }
        weights = {
            i: LayerWeights(
                tensors.get(f"layers.{i}.router"), tensors[f"layers.{i}.down_proj"], tensors[f"layers.{i}.up_proj"]
            )
            for i in layers
        }
        return Adapter(config, weights)

    def inputs(self, owner: Sequence[str | None], ids: torch.dtype = torch.int32) -> "Inputs":
        """Random inputs for one step in which token t belongs to `owner[t]`."""
        tokens, generator = len(owner), self.generator
        is_planned_T = torch.tensor([name is not None for name in owner], dtype=torch.bool)
        x_TD = torch.randn(tokens, self.hidden_size, generator=generator)
        logits_TN = torch.randn(tokens, N, generator=generator) * 2
        weights_TJ, ids_TJ = torch.softmax(logits_TN, -1).topk(J, -1)
        weights_TJ = weights_TJ / weights_TJ.sum(-1, keepdim=True)
        output_TD = torch.randn(tokens, self.hidden_size, generator=generator)
        output_TD[is_planned_T] = 0.0
        for tensor in (x_TD, logits_TN, weights_TJ):
            tensor[~is_planned_T] = torch.nan
        ids_TJ[~is_planned_T] = -1
        base = Base(logits_TN.to(DEVICE), weights_TJ.to(DEVICE), ids_TJ.to(DEVICE, ids))
        return Inputs(x_TD.to(DEVICE, self.dtype), output_TD.to(DEVICE, self.dtype), base)

    def batch(self, owner: Sequence[str | None], size: int | None = None) -> Batch:
        """A batch in which token t belongs to `owner[t]`, the groups in the order of their last tokens."""
        tokens: dict[str, list[int]] = {}
        for t in reversed(range(len(owner))):
            name = owner[t]
            if name is not None:
                tokens.setdefault(name, []).insert(0, t)
        groups, start = [], 0
        for name, of_group in tokens.items():
            groups.append(TokenGroup(self.placed(name), start, start + len(of_group)))
            start += len(of_group)
        tokens_n = torch.tensor([t for of_group in tokens.values() for t in of_group], dtype=torch.int64)
        return Batch(tokens_n, groups, len(owner) if size is None else size)

    def check(self, owner: Sequence[str | None], inputs: "Inputs", layer: int, output_TD: torch.Tensor) -> None:
        """That `output_TD` is what the delta of `layer` makes of `inputs.output_TD`, adapter by adapter."""
        unplanned = [t for t, name in enumerate(owner) if name is None or layer not in self.adapters[name].layers]
        assert torch.equal(output_TD[unplanned], inputs.output_TD[unplanned]), "a token without a delta has changed"
        for name in sorted({name for name in owner if name is not None}):
            adapter = self.adapters[name]
            if layer not in adapter.layers:
                continue
            tokens_n = torch.tensor([t for t, other in enumerate(owner) if other == name])
            expected = inputs.expected(adapter, layer, tokens_n)
            error = (output_TD[tokens_n].cpu().float() - expected).norm() / expected.norm()
            if not expected.any():  # relu may leave one token with nothing
                error = output_TD[tokens_n].float().norm()
            assert error <= TOLERANCE[self.dtype], f"{name} at layer {layer}: error {error:.2e}, {adapter.config}"

    def run(self, owner: Sequence[str | None], ids: torch.dtype = torch.int32) -> None:
        """One step over all layers, each with inputs of its own, checked against the reference."""
        step = self.operator.plan(self.batch(owner))
        for layer in ALL_LAYERS:
            inputs = self.inputs(owner, ids)
            output_TD = inputs.output_TD.clone()
            given = [tensor.clone() for tensor in inputs.read_only()]
            step.start(layer, inputs.x_TD, inputs.base)(output_TD)
            for tensor, old in zip(inputs.read_only(), given, strict=True):
                torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
            self.check(owner, inputs, layer, output_TD)


@dataclass
class Inputs:
    """What one layer of one step is given. output_TD: 0 for planned tokens, so that the sum shows the delta alone."""

    x_TD: torch.Tensor
    output_TD: torch.Tensor
    base: Base

    def read_only(self) -> tuple[torch.Tensor, ...]:
        return self.x_TD, self.base.logits_TN, self.base.weights_TJ, self.base.ids_TJ

    def expected(self, adapter: Adapter, layer: int, tokens_n: torch.Tensor) -> torch.Tensor:
        """The reference's delta of some tokens, float32, on the host."""
        x_nD = self.x_TD[tokens_n].cpu()
        return reference_delta(adapter.config, adapter.layers[layer], x_nD, self.base.routing(tokens_n))

    def fill(self, other: "Inputs") -> None:
        """Take the contents of other inputs, at the same addresses."""
        for mine, theirs in zip(
            (*self.read_only(), self.output_TD), (*other.read_only(), other.output_TD), strict=True
        ):
            mine.copy_(theirs)


def config_of(number: int, **given: Any) -> AdapterConfig:
    """`given`, with what it leaves open chosen by `number`: experts 1..7, top-k 1..M, which layers."""
    values: dict[str, Any] = {"base_model_name_or_path": "b", "num_experts": 1 + number % 7} | given
    if values["variant"] == "R":
        most = J if values.get("gate_weight") == "base_slot" else values["num_experts"]
        values.setdefault("top_k", 1 + number // 7 % min(most, values["num_experts"]))
    values.setdefault("layers", (None, LAYERS[:1], None, LAYERS[1:], LAYERS)[number % 5])
    return AdapterConfig.model_validate(values)


def any_configs(count: int, **given: Any) -> list[AdapterConfig]:
    """Configurations that differ in variant, expert type, bottleneck and number of experts."""
    bottlenecks = (5, 1, 16, 3)
    return [
        config_of(i * 3 + 1, **({"bottleneck": bottlenecks[i % 4]} | VARIANTS[i % 6] | EXPERT_TYPES[i * 3 % 4] | given))
        for i in range(count)
    ]


def owners(popularity: str, tokens: int, names: Sequence[str], generator: torch.Generator) -> list[str | None]:
    """Which adapter each token uses. Token 0 always uses the first."""

    def draw(choices: Sequence[int | None]) -> list[int | None]:
        return [choices[int(i)] for i in torch.randint(len(choices), (tokens - 1,), generator=generator)]

    numbers: list[int | None]
    match popularity:
        case "one":
            numbers = [0] * tokens
        case "different":
            numbers = list(range(tokens))
        case "uniform":
            numbers = [0, *draw((0, 1, 2, 3))]
        case "skewed":
            numbers = [0, *draw((0,) * 12 + (1, 1, 2))]
        case _:
            numbers = [0, *draw((None, None, 0, 1, 2))]
    return [None if number is None else names[number % len(names)] for number in numbers]


def all_rows(placed: PlacedAdapter) -> list[Rows]:
    """Every part of the pool that belongs to an adapter."""
    every = [part for rows in placed.layers.values() for part in (rows.router, rows.down, rows.up)]
    return [part for part in every if part is not None]
