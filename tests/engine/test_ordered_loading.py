"""Adapters that are loaded by order, beside the steps, answer like adapters that were loaded inside a step."""

import shutil
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from adapters.format.folder import read_folder
from perft.engine import host_cache
from perft.engine.expert_counts import ExpertCounts
from perft.engine.pool import PackedAdapter, pack
from tests.engine.engines import TinyEngine, greedy, prompts
from tests.synthetic import write_adapter

IDS = count(7000)


def manager_of(engine: TinyEngine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager


def order_for(engine: TinyEngine, folder: Path, digest: str | None = None) -> dict[str, Any]:
    """The adapter in `folder` under a new engine id, as it travels to the workers."""
    number = next(IDS)
    digest = digest or read_folder(folder, manager_of(engine).base).digest
    return {
        "name": f"ordered@{number}",
        "engine_id": number,
        "kind": "PERFT",
        "digest": digest,
        "folder": str(folder),
    }


def move(engine: TinyEngine, name: str, order: dict[str, Any], *more: Any) -> dict[str, Any]:
    """Run a move to its end; its outcome."""
    (outcome,) = engine.llm.collective_rpc(f"perft_{name}", args=(order, *more))
    while outcome["state"] == "running":
        time.sleep(0.01)
        (outcome,) = engine.llm.collective_rpc("perft_outcome", args=(name, order))
    return dict(outcome)


def answer(engine: TinyEngine, order: dict[str, Any]) -> list[int]:
    request = LoRARequest(order["name"], order["engine_id"], order["folder"])
    (output,) = engine.llm.generate(
        [{"prompt_token_ids": prompts(1, seed=40)[0]}], greedy(12), lora_request=[request], use_tqdm=False
    )
    return list(output.outputs[0].token_ids)


def test_an_ordered_adapter_answers_like_one_that_a_step_loaded(engine: TinyEngine, tmp_path: Path) -> None:
    manager = manager_of(engine)
    at_once = order_for(engine, write_adapter(tmp_path / "at-once", manager.base, 41))
    expected = answer(engine, at_once)
    read_in_steps, used = manager.step_loader.bytes_read, manager.pool.used
    assert read_in_steps > 0
    manager.remove_adapter(at_once["engine_id"])
    ordered = order_for(engine, write_adapter(tmp_path / "ordered", manager.base, 41))
    assert move(engine, "prepare", ordered)["state"] == "done"
    assert manager.pool.used < used, "the host takes no rows"
    assert move(engine, "place", ordered, [])["state"] == "done"
    shutil.rmtree(ordered["folder"])
    assert answer(engine, ordered) == expected
    assert manager.step_loader.bytes_read == read_in_steps, "nothing was read inside a step"
    for method, argument in (("evict", ordered), ("drop", ordered), ("forget", ordered["engine_id"])):
        engine.llm.collective_rpc(f"perft_{method}", args=(argument,))
    assert manager.pool.used < used
    manager.pool.check_integrity()


def test_an_evicted_adapter_comes_back_from_the_host(engine: TinyEngine, tmp_path: Path) -> None:
    manager = manager_of(engine)
    used = manager.pool.used
    first, second = (order_for(engine, write_adapter(tmp_path / str(seed), manager.base, seed)) for seed in (42, 43))
    for order in (first, second):
        assert move(engine, "prepare", order)["state"] == "done"
        shutil.rmtree(order["folder"])
    assert move(engine, "place", first, [])["state"] == "done"
    expected = answer(engine, first)
    assert move(engine, "place", second, [first])["state"] == "done"
    rows = manager.pool.used - used
    assert manager.pool.get(first["digest"]) is None and manager.pool.get(second["digest"]) is not None
    with pytest.raises(KeyError, match="no rows on the device"):
        manager._plan([first["engine_id"]])
    assert move(engine, "place", first, [second])["state"] == "done"
    assert manager.pool.used - used == rows and answer(engine, first) == expected
    for order in (first, second):
        for method, argument in (("evict", order), ("drop", order), ("forget", order["engine_id"])):
            engine.llm.collective_rpc(f"perft_{method}", args=(argument,))
    assert manager.pool.used == used


def test_failures_are_reported_and_leave_nothing(engine: TinyEngine, tmp_path: Path) -> None:
    manager = manager_of(engine)
    used = manager.pool.used
    folder = write_adapter(tmp_path / "changed", manager.base, 44)
    changed = move(engine, "prepare", order_for(engine, folder, digest="0" * 64))
    assert changed["state"] == "failed" and "were changed" in changed["reason"]
    absent = move(engine, "place", order_for(engine, folder), [])
    assert absent["state"] == "failed"
    huge = {"variant": "D", "num_experts": 64, "bottleneck": 256, "expert_type": "lora", "alpha": 1.0}
    order = order_for(
        engine, write_adapter(tmp_path / "huge", manager.base, 45, {**huge, "base_model_name_or_path": ""})
    )
    assert move(engine, "prepare", order)["state"] == "done"
    full = move(engine, "place", order, [])
    assert full["state"] == "failed" and "too_many_rows" in full["reason"]
    engine.llm.collective_rpc("perft_drop", args=(order,))
    assert manager.pool.used == used
    manager.pool.check_integrity()


def inventory(engine: TinyEngine) -> dict[str, Any]:
    (held,) = engine.llm.collective_rpc("perft_inventory")
    return dict(held)


def test_the_inventory_lists_what_a_worker_holds(engine: TinyEngine, tmp_path: Path) -> None:
    manager = manager_of(engine)
    order = order_for(engine, write_adapter(tmp_path / "listed", manager.base, 47))
    key, before = order["digest"], inventory(engine)
    assert key not in before["host"] + before["device"] + before["moving"]
    assert move(engine, "prepare", order)["state"] == "done"
    prepared = inventory(engine)
    assert key in prepared["host"] and prepared["device"] == before["device"]
    assert prepared["rows_used"] == before["rows_used"]
    assert move(engine, "place", order, [])["state"] == "done"
    placed = inventory(engine)
    assert key in placed["host"] and key in placed["device"] and placed["moving"] == []
    assert placed["rows_used"] == manager.pool.used > before["rows_used"]
    engine.llm.collective_rpc("perft_evict", args=(order,))
    assert inventory(engine) == prepared
    engine.llm.collective_rpc("perft_drop", args=(order,))
    assert inventory(engine) == before


def test_a_key_of_the_inventory_can_be_freed(engine: TinyEngine, tmp_path: Path) -> None:
    """As the server does with what it knows nothing about; a key that is not held is ignored."""
    manager = manager_of(engine)
    order = order_for(engine, write_adapter(tmp_path / "freed", manager.base, 48))
    key, before = order["digest"], inventory(engine)
    for name in ("prepare", "place"):
        assert move(engine, name, order, *([[]] if name == "place" else []))["state"] == "done"
    for method in ("perft_evict_key", "perft_drop_key") * 2:
        engine.llm.collective_rpc(method, args=(key,))
    assert inventory(engine) == before
    manager.pool.check_integrity()


def test_an_evicted_key_that_a_step_loaded_is_loaded_again(engine: TinyEngine, tmp_path: Path) -> None:
    manager = manager_of(engine)
    order = order_for(engine, write_adapter(tmp_path / "unordered", manager.base, 49))
    expected = answer(engine, order)
    assert order["digest"] in inventory(engine)["device"] and order["digest"] not in inventory(engine)["host"]
    engine.llm.collective_rpc("perft_evict_key", args=(order["digest"],))
    assert order["digest"] not in inventory(engine)["device"]
    read = manager.step_loader.bytes_read
    assert answer(engine, order) == expected and manager.step_loader.bytes_read > read
    manager.remove_adapter(order["engine_id"])


def test_a_move_under_way_is_not_held_yet(engine: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(engine)
    order = order_for(engine, write_adapter(tmp_path / "slow", manager.base, 50))
    key, before = order["digest"], inventory(engine)
    may_go_on = threading.Event()

    def pack_slowly(*args: Any) -> PackedAdapter:
        assert may_go_on.wait(500)
        return pack(*args)

    monkeypatch.setattr(host_cache, "pack", pack_slowly)
    (started,) = engine.llm.collective_rpc("perft_prepare", args=(order,))
    assert started["state"] == "running"
    assert inventory(engine) == {**before, "moving": [key]}
    may_go_on.set()
    assert move(engine, "prepare", order)["state"] == "done"
    assert key in inventory(engine)["host"] and inventory(engine)["moving"] == []
    engine.llm.collective_rpc("perft_drop_key", args=(key,))
    assert inventory(engine) == before


def test_expert_tokens_are_counted(engine: TinyEngine) -> None:
    """The engine of the tests counts every step: K experts a token and layer for R, the base's top-k for E."""
    manager = manager_of(engine)
    top_k = {"mixtral": 2, "olmoe": 3, "qwen3_moe": 2}[engine.kind]
    for case, chosen in ((0, 2), (2, top_k)):
        assert engine.cases[case][0] == ("R" if case == 0 else "E")
        before = sum(manager.expert_counts.read().get(case + 1, [0]))
        prompt = prompts(1, seed=46 + case)[0]
        engine.generate([(prompt, case)], tokens=8)
        counted = sum(manager.expert_counts.read()[case + 1]) - before
        assert counted == (len(prompt) + 7) * chosen * len(manager.base.moe_layers)
    (counters,) = engine.llm.collective_rpc("perft_counters")
    assert counters["expert_tokens"][1] == manager.expert_counts.read()[1]


def test_every_nth_step_is_counted() -> None:
    counts = ExpertCounts(3)
    assert [counts.watch() is not None for _ in range(6)] == [False, False, True] * 2
    assert all(ExpertCounts(0).watch() is None for _ in range(3))
