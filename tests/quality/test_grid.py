"""The grid compares like with like, and goes on where it was stopped."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import grid
from benchmarks.quality.base import Recipe, make_model
from benchmarks.quality.grid import LARGEST_DIFFERENCE, LIKE_LORA, METHODS, ORDER, Part, Run, activated, width_of
from benchmarks.quality.larger import LARGER
from benchmarks.quality.runs import Steps, keep_busy, next_runs, projections_of, results, train_options
from perft.hf import moe_blocks, shape_of
from perft.training.baselines import with_baseline
from perft.training.options import read_options
from tests.server.processes import LIMIT_S


class Tokens:
    """As many as the base's vocabulary."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return Recipe().vocabulary


@pytest.fixture(scope="module")
def base() -> Any:
    return make_model(Recipe(), Tokens())


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [*((Recipe(), each) for each in LIKE_LORA["small"]), *((LARGER, each) for each in LIKE_LORA["larger"])],
)
def test_methods_of_a_budget_activate_equally_many_parameters(recipe: Recipe, budget: int) -> None:
    with torch.device("meta"):
        base = make_model(recipe, Tokens())
    shape, projections = shape_of(base), projections_of(base)
    counts = {m: activated(m, width_of(m, budget, shape, projections), shape, projections) for m in METHODS}
    assert max(counts.values()) / min(counts.values()) - 1 <= LARGEST_DIFFERENCE, counts


@pytest.mark.parametrize("method", METHODS)
def test_what_is_counted_is_what_is_there(base: Any, method: str, tmp_path: Path) -> None:
    """Of the trainable parameters of a real adapter, those of the experts that a token does not use are left out."""
    shape, projections = shape_of(base), projections_of(base)
    width = width_of(method, LIKE_LORA["small"][0], shape, projections)
    counted, of = activated(method, width, shape, projections), METHODS[method]
    if of.variant is None:
        run = Run("small", "arithmetic", method, 4, 1e-3)
        files = {"train": tmp_path / "a", "tune": tmp_path / "b"}
        options = read_options(train_options(run, tmp_path, files, Steps(), width, tmp_path / "out"))
        model = with_baseline(make_model(Recipe(), Tokens()), options)
        assert counted == sum(each.numel() for each in model.parameters() if each.requires_grad)
        return
    from perft.hf import attach

    model = make_model(Recipe(), Tokens())
    adapter = attach(model, grid.config_of(method, width, shape))
    of_experts = {name: each.numel() for name, each in adapter.named_parameters() if "router" not in name}
    others = sum(each.numel() for each in adapter.parameters()) - sum(of_experts.values())
    used = {"R": of.top_k, "E": shape.top_k, "D": of.experts, "S": 1}[of.variant or ""] or 0
    assert counted == others + sum(of_experts.values()) * used // adapter.config.num_experts


def test_a_partial_grid_is_a_fair_comparison() -> None:
    """Once the learning rates are known, a seed is done for every method before the next seed."""
    part = Part("small", "arithmetic", 4, (0, 1, 2))
    found: dict[str, Any] = {}
    runs = finished(found, [part])
    later = [run for run in runs if run.seed != grid.TUNING_SEED]
    assert [run.seed for run in later] == [1] * len(METHODS) + [2] * len(METHODS)
    assert [run.method for run in later] == 2 * list(METHODS)
    tuned = [run for run in runs if run.seed == grid.TUNING_SEED and run.method != grid.BASE]
    assert [run.method for run in tuned] == 3 * list(METHODS), "and a learning rate is tried for every method"
    assert later[0] not in tuned and {run.method for run in tuned} == set(METHODS)


def test_the_learning_rate_is_the_best_on_the_tune_part_and_no_edge() -> None:
    """The loss falls up to 3e-1, which is not among the first three: it is reached, and passed."""
    part = Part("small", "kinds", 4, (0, 1), ("E",))
    found: dict[str, Any] = {}
    runs = finished(found, [part], best=3e-1)
    assert [run.learning_rate for run in runs] == [0.0, 3e-2, 1e-2, 1e-1, 3e-1, 1.0, 3e-1]
    assert runs[-1].seed == 1


def finished(found: dict[str, Any], order: list[Part], best: float = 3e-2) -> list[Run]:
    """Every run of a grid, done one after another as `runs.run_all` does; the loss is lowest at `best`."""
    done = []
    while (run := next((run for run in grid.planned(found, order) if run.name not in found), None)) is not None:
        found[run.name] = {"tune": {"loss": abs(run.learning_rate - best)}}
        done.append(run)
    return done


def end(run: Run, folder: Path, best: float = 3e-2) -> None:
    """As if it had been done; the loss is lowest at `best`."""
    file = folder / f"{run.name}.json"
    file.with_suffix(".new").write_text(json.dumps({"tune": {"loss": abs(run.learning_rate - best)}}))
    file.with_suffix(".new").replace(file)


def test_of_runs_beside_each_other_none_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the base and the learning rates, then one seed after the other, each with all methods."""
    part = Part("small", "arithmetic", 4, (0, 1, 2), ("qvlora", "E"))
    monkeypatch.setattr("benchmarks.quality.runs.ORDER", (part,))
    batches = []
    while left := next_runs("small", tmp_path):
        batches.append([(run.method, run.seed) for run in left])
        for run in left:
            end(run, tmp_path)
    assert batches == [
        [(grid.BASE, 0), *[("qvlora", 0), ("E", 0)] * 3], [("qvlora", 1), ("E", 1)], [("qvlora", 2), ("E", 2)],
    ]  # fmt: skip
    assert next_runs("demo", tmp_path) == []


def test_a_core_is_not_idle_while_a_run_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, beside the last run of one seed goes on the first of the next: here that run ends only then."""
    part = Part("small", "kinds", 4, (0, 1, 2), ("qvlora", "S", "E"))
    monkeypatch.setattr("benchmarks.quality.runs.ORDER", (part,))
    order, going, next_seed = list[tuple[str, int]](), set[Run](), threading.Event()

    class Pool(ThreadPoolExecutor):
        def submit(self, do: Callable[[Run], None], run: Run) -> Future[None]:  # type: ignore[override]
            order.append((run.method, run.seed))
            return super().submit(do, run)

    def do(run: Run) -> None:
        going.add(run)
        assert len(going) <= 2
        if run.seed == 2:
            next_seed.set()
        assert (run.method, run.seed) != ("E", 1) or next_seed.wait(LIMIT_S)
        end(run, tmp_path)
        going.remove(run)

    monkeypatch.setattr("benchmarks.quality.runs._do_and_tell", do)
    with Pool(2) as pool:
        keep_busy(pool, 2, lambda begun: next_runs("small", tmp_path, begun=begun))
    seeds = [seed for _, seed in order]
    tried, seeded = 3 * [(method, 0) for method in part.methods], product(part.methods, (1, 2))
    assert sorted(order) == sorted([(grid.BASE, 0), *tried, *seeded])
    assert seeds == sorted(seeds)


def test_the_seeds_wait_for_the_last_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("small", "kinds", 4, (0, 1), ("qvlora", "E"))
    monkeypatch.setattr("benchmarks.quality.runs.ORDER", (part,))
    *others, last = next_runs("small", tmp_path)
    for run in others:
        end(run, tmp_path)
    assert next_runs("small", tmp_path, begun=[last]) == []
    end(last, tmp_path)
    assert [run.seed for run in next_runs("small", tmp_path)] == [1, 1]


def test_a_run_that_fails_is_told_and_those_beside_it_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.runs.ORDER", (Part("small", "kinds", 4, (0,), ("qvlora", "S")),))

    def do(run: Run) -> None:
        if run.method == "qvlora":
            raise ValueError("found no adapter")
        end(run, tmp_path)

    monkeypatch.setattr("benchmarks.quality.runs._do_and_tell", do)
    with pytest.raises(ValueError, match="found no adapter"), ThreadPoolExecutor(3) as pool:
        keep_busy(pool, 3, lambda begun: next_runs("small", tmp_path, begun=begun))
    assert Run("small", "kinds", "S", 4, 3e-2).name in results(tmp_path)


def test_the_names_of_all_runs_differ() -> None:
    found: dict[str, Any] = {}
    runs = finished(found, list(ORDER))
    assert len({run.name for run in runs}) == len(runs) > 200
    whole = [part for part in ORDER if part.base == "small" and part.longer == 1]
    assert all(tuple(part.methods) == tuple(METHODS) for part in whole)


def test_every_method_is_told_the_same_but_for_what_it_is(tmp_path: Path) -> None:
    files = {part: tmp_path / part for part in ("train", "tune")}
    told = [
        train_options(Run("small", "kinds", method, 4, 1e-3), tmp_path, files, Steps(), 4, tmp_path)
        for method in METHODS
    ]
    own = {"method", "variant", "num_experts", "top_k"}
    assert all({key: value for key, value in each.items() if key not in own} ==
               {key: value for key, value in told[0].items() if key not in own} for each in told)  # fmt: skip


def test_moe_blocks_are_where_the_budget_counts_them(base: Any) -> None:
    assert len(moe_blocks(base)) == Recipe().layers
    assert torch.equal(make_model(Recipe(), Tokens()).model.embed_tokens.weight, base.model.embed_tokens.weight)
