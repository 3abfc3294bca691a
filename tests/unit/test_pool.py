"""The row pool: every row is free or one adapter's, an adapter costs what it has, contents survive fragmentation."""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.engine.pool import PackedAdapter, PoolFullError, RowPool, pack
from perft.engine.settings import DEFAULT_POOL_FRACTION, EngineSettings
from perft.memory import memory_bytes
from perft.operator import PlacedAdapter
from perft.operator.free_runs import FreeRuns, runs_of
from perft.operator.tables import PAGE_ROWS, Meta, index_entries, pool_rows
from perft.reference import LayerWeights

D = 3
LAYERS = (0, 1, 4)
CPU = torch.device("cpu")

Size = tuple[str, int, int, int]
"""Variant, experts M, bottleneck B, how many layers."""

SIZES: tuple[Size, ...] = (
    ("S", 1, 1, 1),
    ("R", 1, 1, 1),
    ("S", 1, 1, 3),
    ("D", 2, 2, 1),
    ("R", 3, 1, 2),
    ("R", 2, 3, 3),
    ("E", 4, 2, 2),
    ("S", 1, 8, 1),
    ("D", 3, 3, 2),
    ("R", 5, 4, 2),
)
TOTAL = 10 * PAGE_ROWS


def config_of(size: Size) -> AdapterConfig:
    variant, experts, bottleneck, layers = size
    values: dict[str, Any] = {"base_model_name_or_path": "b", "variant": variant, "expert_type": "parallel"}
    values |= {"num_experts": experts, "bottleneck": bottleneck, "layers": LAYERS[:layers]}
    values |= {"top_k": 1, "renormalize": True} if variant == "R" else {}
    return AdapterConfig.model_validate(values)


def tensors_of(config: AdapterConfig, seed: int) -> dict[int, LayerWeights]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator)
        for name, shape in config.tensor_shapes(config.layers or (), D).items()
    }
    return {
        i: LayerWeights(made.get(f"layers.{i}.router"), made[f"layers.{i}.down_proj"], made[f"layers.{i}.up_proj"])
        for i in config.layers or ()
    }


def packed(number: int) -> PackedAdapter:
    """The adapter of digest `number`: size and contents follow from it."""
    config = config_of(SIZES[number])
    return pack(config, tensors_of(config, number))


def rows_of(number: int) -> int:
    """The rows of digest `number` by docs/format.md's shapes (M B down, M B up, M router a layer), in pages."""
    variant, experts, bottleneck, layers = SIZES[number]
    own = layers * (2 * experts * bottleneck + (experts if variant == "R" else 0))
    return (own + PAGE_ROWS - 1) // PAGE_ROWS * PAGE_ROWS


def assert_contents(pool: RowPool, placed: PlacedAdapter, number: int) -> None:
    """What lies in the pool is digest `number`'s tensors."""
    config = config_of(SIZES[number])
    shape_down, shape_up = (config.num_experts, config.bottleneck, D), (config.num_experts, config.bottleneck, D)
    expected = tensors_of(config, number)
    assert placed.config == config and tuple(placed.layers) == tuple(expected)
    for layer, weights in expected.items():
        rows = placed.layers[layer]
        assert torch.equal(pool.tensor_RD[rows.down].view(shape_down), weights.down_proj)
        assert torch.equal(pool.tensor_RD[rows.up].view(shape_up).transpose(1, 2), weights.up_proj)
        assert (rows.router is None) == (weights.router is None)
        if rows.router is not None and weights.router is not None:
            assert torch.equal(pool.tensor_RD[rows.router], weights.router)
        first = int(pool.tables.layer_offset[layer, placed.slot])
        by_table = torch.stack([row_by_table(pool, placed.slot, first + i) for i in range(config.rows_per_layer())])
        parts = [*([] if weights.router is None else [weights.router]), weights.down_proj.flatten(0, 1)]
        assert torch.equal(by_table, torch.cat([*parts, weights.up_proj.transpose(1, 2).flatten(0, 1)]))
    absent = set(range(LAYERS[-1] + 1)) - set(expected)
    assert all(pool.tables.layer_offset[layer, placed.slot] == -1 for layer in absent)


def row_by_table(pool: RowPool, slot: int, row: int) -> torch.Tensor:
    """A slot's logical row, found as a kernel finds it."""
    index = int(pool.tables.meta[slot, Meta.INDEX])
    page = int(pool.tables.page_index[index + row // PAGE_ROWS])
    return pool.tensor_RD[page * PAGE_ROWS + row % PAGE_ROWS]


class PoolMachine(RuleBasedStateMachine):
    """Adapters come and go in any order; after every step the pool agrees with a plain set of digests."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = RowPool(TOTAL, D, torch.float32, CPU, LAYERS[-1] + 1)
        self.pool.tensor_RD.fill_(torch.nan)
        self.present: dict[int, PlacedAdapter] = {}

    @rule(number=st.integers(0, len(SIZES) - 1))
    def put(self, number: int) -> None:
        free, before = TOTAL - self.pool.used, self.pool.tensor_RD.clone()
        if number in self.present:
            assert self.pool.put(str(number), packed(number)) is self.present[number]
            assert self.pool.used == TOTAL - free
        elif rows_of(number) > free:
            said = f"takes {rows_of(number)} rows, the pool has {free} free of {TOTAL}"
            with pytest.raises(PoolFullError, match=said):
                self.pool.put(str(number), packed(number))
            torch.testing.assert_close(self.pool.tensor_RD, before, rtol=0, atol=0, equal_nan=True)
        else:
            self.present[number] = self.pool.put(str(number), packed(number))
            assert self.pool.used == TOTAL - free + rows_of(number)

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.present)))
        self.pool.remove(str(number))
        del self.present[number]

    @rule(number=st.integers(0, len(SIZES) - 1))
    def remove_what_is_not_there(self, number: int) -> None:
        if number not in self.present:
            with pytest.raises(KeyError):
                self.pool.remove(str(number))

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.total == TOTAL
        assert self.pool.used == sum(rows_of(number) for number in self.present)
        for number in range(len(SIZES)):
            placed = self.pool.get(str(number))
            assert placed is self.present.get(number)
            if placed is not None:
                assert_contents(self.pool, placed, number)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_an_adapter_costs_the_pages_that_its_rows_fill(number: int) -> None:
    adapter, config = packed(number), config_of(SIZES[number])
    pool = RowPool(TOTAL, D, torch.float32, CPU, LAYERS[-1] + 1)
    pool.put("a", adapter)
    assert pool.used == adapter.rows == rows_of(number)
    assert pool_rows(config.rows_per_layer() * len(config.layers or ())) == rows_of(number)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_pool_of_exactly_its_rows_is_enough(number: int) -> None:
    pool = RowPool(rows_of(number), D, torch.float32, CPU, LAYERS[-1] + 1)
    assert_contents(pool, pool.put("a", packed(number)), number)
    assert pool.used == pool.total
    with pytest.raises(PoolFullError):
        pool.put("b", packed(0))
    pool.remove("a")
    assert pool.used == 0


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_one_row_less_is_too_few(number: int) -> None:
    pool = RowPool(rows_of(number) - 1, D, torch.float32, CPU, LAYERS[-1] + 1)
    pool.tensor_RD.fill_(7)
    whole = rows_of(number) - PAGE_ROWS
    with pytest.raises(PoolFullError, match=rf"takes {rows_of(number)} rows, the pool has {whole} free of {whole}"):
        pool.put("a", packed(number))
    assert pool.used == 0 and pool.get("a") is None and (pool.tensor_RD == 7).all()
    pool.check_integrity()


def test_the_same_digest_twice_costs_nothing() -> None:
    pool = RowPool(TOTAL, D, torch.float32, CPU, LAYERS[-1] + 1)
    placed = pool.put("a", packed(5))
    used = pool.used
    assert pool.put("a", packed(5)) is placed and pool.used == used
    pool.remove("a")
    assert pool.used == 0 and pool.get("a") is None


def test_the_same_digest_is_found_even_in_a_full_pool() -> None:
    pool = RowPool(rows_of(5), D, torch.float32, CPU, LAYERS[-1] + 1)
    assert pool.put("a", packed(5)) is pool.put("a", packed(5))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_freed_rows_are_one_run_again(order: Sequence[int]) -> None:
    """However they left, the whole pool is free for one adapter in one run."""
    pool = RowPool(4 * rows_of(4), D, torch.float32, CPU, LAYERS[-1] + 1)
    for name in range(4):
        pool.put(str(name), packed(4))
    assert pool.used == pool.total
    for name in order:
        pool.remove(str(name))
    config = config_of(("D", pool.total // 2, 1, 1))
    placed = pool.put("all", pack(config, tensors_of(config, 0)))
    assert isinstance(placed.layers[0].down, slice) and isinstance(placed.layers[0].up, slice)
    assert pool.used == pool.total


def test_a_fragmented_pool_takes_all_its_free_pages() -> None:
    """Holes of one page: whatever fits by number fits, scattered, and its neighbours stay where they are."""
    pool = RowPool(2 * rows_of(5), D, torch.float32, CPU, LAYERS[-1] + 1)
    pool.tensor_RD.fill_(torch.nan)
    fillers = [str(i) for i in range(pool.total // PAGE_ROWS)]
    for name in fillers:
        pool.put(name, packed(0))
    for name in fillers[::2]:
        pool.remove(name)
    placed = pool.put("a", packed(5))
    assert pool.used == pool.total
    assert len(runs_of(pool._taken["a"].pages)) == len(fillers) // 2 > 1
    assert any(isinstance(part, torch.Tensor) for rows in placed.layers.values() for part in (rows.down, rows.up))
    assert_contents(pool, placed, 5)
    for name in fillers[1::2]:
        filler = pool.get(name)
        assert filler is not None
        assert_contents(pool, filler, 0)
    pool.check_integrity()


def test_contents_are_cast_to_the_dtype_of_the_pool() -> None:
    pool = RowPool(TOTAL, D, torch.bfloat16, CPU, LAYERS[-1] + 1)
    adapter = packed(5)
    placed = pool.put("a", adapter)
    for layer, weights in tensors_of(adapter.config, 5).items():
        down_MBD = weights.down_proj.to(torch.bfloat16)
        assert torch.equal(pool.tensor_RD[placed.layers[layer].down], down_MBD.flatten(0, 1))


@pytest.mark.parametrize("fault", ["lost", "twice", "slot", "entry", "unknown"])
def test_check_integrity_notices(fault: str) -> None:
    pool = RowPool(TOTAL, D, torch.float32, CPU, LAYERS[-1] + 1)
    pool.put("a", packed(3))
    match fault:
        case "lost":
            pool._free_pages._runs.clear()
        case "twice":
            pool._free_pages.give([0])
        case "slot":
            pool._placed["a"] = replace(pool._placed["a"], slot=1)
        case "entry":
            pool._free_entries.take_first(1)
        case _:
            del pool._placed["a"]
    with pytest.raises(AssertionError):
        pool.check_integrity()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_copy_that_breaks_off_gives_its_rows_back(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = RowPool(TOTAL, D, torch.float32, CPU, LAYERS[-1] + 1)
    pool.put("there", packed(0))
    copy = pool._copy

    def break_off(rows_RD: torch.Tensor, pages: Sequence[int]) -> None:
        copy(rows_RD[:PAGE_ROWS], pages[:1])
        raise error("no more")

    with monkeypatch.context() as broken:
        broken.setattr(pool, "_copy", break_off)
        with pytest.raises(error, match="no more"):
            pool.put("a", packed(5))
    pool.check_integrity()
    assert pool.used == rows_of(0) and pool.get("a") is None
    assert_contents(pool, pool.put("a", packed(5)), 5)


def test_two_copies_of_one_adapter_at_once_take_its_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RowPool(4 * rows_of(5), D, torch.float32, CPU, LAYERS[-1] + 1)
    copy, copying, goes_on, copies = pool._copy, threading.Event(), threading.Event(), list[Any]()

    def slow(*given: Any) -> None:
        copies.append(given)
        copying.set()
        assert goes_on.wait(300)
        copy(*given)

    monkeypatch.setattr(pool, "_copy", slow)
    threads = [threading.Thread(target=pool.put, args=("a", packed(5))) for _ in range(2)]
    threads[0].start()
    assert copying.wait(300)
    threads[1].start()
    threads[1].join(0.3)  # time in which it would copy as well
    goes_on.set()
    for thread in threads:
        thread.join(300)
    pool.check_integrity()
    assert len(copies) == 1 and pool.used == rows_of(5)
    pool.remove("a")
    assert pool.used == 0


GIB = 1024**3
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
LIMITS: dict[str, tuple[str, str, int]] = {
    "v2": ("memory.max", f"{GIB}\n", GIB),
    "v2 without a limit": ("memory.max", "max\n", MACHINE),
    "v1": ("memory/memory.limit_in_bytes", f"{GIB}\n", GIB),
    "v1 without a limit": ("memory/memory.limit_in_bytes", "9223372036854771712\n", MACHINE),
    "larger than the machine": ("memory.max", str(2 * MACHINE), MACHINE),
    "unreadable": ("memory.max", "", MACHINE),
    "none": ("other", "1", MACHINE),
}


@pytest.mark.parametrize("case", LIMITS)
def test_memory_is_the_machines_or_the_containers(tmp_path: Path, case: str) -> None:
    file, text, expected = LIMITS[case]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert memory_bytes(tmp_path) == expected


def test_the_default_size_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseShape(hidden_size=8, num_layers=1, moe_layers=(0,), num_experts=4, top_k=2, dtype=torch.float32)
    monkeypatch.setattr("perft.engine.settings.memory_bytes", lambda: GIB)
    assert EngineSettings().rows(base, CPU) == int(GIB * DEFAULT_POOL_FRACTION) // 32
    assert EngineSettings(pool_rows=7).rows(base, CPU) == 7


def test_an_adapter_of_another_width_leaves_the_pool_whole() -> None:
    """A failure half-way through a copy must not lose rows."""
    pool = RowPool(TOTAL, D + 1, torch.float32, CPU, LAYERS[-1] + 1)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        pool.put("a", packed(5))
    pool.check_integrity()
    assert pool.used == 0 and pool.get("a") is None


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 10**6)), max_size=200))
def test_a_run_of_index_entries_is_always_free_while_pages_are(changes: list[tuple[bool, int, int]]) -> None:
    """Whatever comes and goes, first-fit over `index_entries` finds a run for all pages that are free."""
    pages = 64
    free, held = FreeRuns(index_entries(pages)), list[tuple[int, int]]()
    for comes, count, choice in changes:
        if comes and sum(n for _, n in held) + count <= pages:
            held.append((free.take_first(count), count))
        elif held:
            start, length = held.pop(choice % len(held))
            free.give(range(start, start + length))
    taken = sorted(number for start, count in held for number in range(start, start + count))
    assert len(taken) == len(set(taken)) and len(free) == index_entries(pages) - len(taken)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 10**6)), max_size=60))
def test_free_runs_are_a_set_of_numbers(changes: list[tuple[bool, int, int]]) -> None:
    free, expected, held = FreeRuns(40), set(range(40)), list[list[int]]()
    for takes, count, choice in changes:
        if takes and count <= len(expected):
            held.append(free.take(count))
            assert len(held[-1]) == count and set(held[-1]) <= expected
            expected -= set(held[-1])
        elif held:
            back = held.pop(choice % len(held))
            free.give(sorted(back))
            expected |= set(back)
        runs = list(free)
        assert {number for run in runs for number in run} == expected and len(free) == len(expected)
        assert all(a.stop < b.start for a, b in pairwise(runs)), "runs that touch are one"
