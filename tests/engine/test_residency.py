"""What adapters occupy on the device: their own rows, and nothing of the base's memory."""

from dataclasses import replace
from pathlib import Path

import pytest
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from adapters.errors import InvalidAdapterError
from perft.engine.base_router import embedded_problem
from perft.engine.host_cache import OtherContentsError
from perft.engine.layer_classes import PerftMoERunner
from perft.engine.manager import WARM_UP_PATH, AdapterIdentityError
from perft.engine.pool import PoolFullError
from perft.operator.tables import PAGE_ROWS
from tests.engine.engines import TinyEngine, prompts
from tests.synthetic import RANDOM_R, write_adapter


def resident_bytes() -> int:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_sixty_four_adapters_take_their_real_rows_and_nothing_of_the_base(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    blocks = engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    used = manager.pool.used
    names = range(1000, 1064)
    before = resident_bytes()
    expected = 0
    for number in names:
        bottleneck = 1 + number % 3
        folder = write_adapter(tmp_path / str(number), manager.base, number, {**RANDOM_R, "bottleneck": bottleneck})
        engine.llm.llm_engine.add_lora(LoRARequest(f"many-{number}@1", number, str(folder)))
        rows = len(manager.base.moe_layers) * (4 + 2 * 4 * bottleneck)
        expected += rows + -rows % PAGE_ROWS
    assert manager.pool.used - used == expected
    manager.pool.check_integrity()
    row_bytes = manager.base.hidden_size * manager.base.dtype.itemsize
    assert resident_bytes() - before < expected * row_bytes + 64 * 2**20
    assert engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == blocks
    (plain,) = engine.generate([(prompts(1)[0], None)], tokens=8)
    engine.check(None, plain)
    for number in names:
        engine.llm.llm_engine.remove_lora(number)
    assert manager.pool.used == used


def test_two_names_with_one_content_share_their_rows(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    folder = write_adapter(tmp_path / "shared", manager.base, 5)
    used = manager.pool.used
    for number in (1100, 1101):
        engine.llm.llm_engine.add_lora(LoRARequest(f"twin-{number}@1", number, str(folder)))
    rows = (4 + 2 * 4 * 16) * len(manager.base.moe_layers)
    rows += -rows % PAGE_ROWS
    assert manager.pool.used - used == rows
    engine.llm.llm_engine.remove_lora(1100)
    assert manager.pool.used - used == rows
    engine.llm.llm_engine.remove_lora(1101)
    assert manager.pool.used == used


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    values = {**RANDOM_R, "variant": "D", "num_experts": 64, "bottleneck": 256}
    values = {key: value for key, value in values.items() if key not in ("top_k", "renormalize")}
    used = manager.pool.used
    folder = write_adapter(tmp_path / "huge", manager.base, 6, values)
    with pytest.raises(PoolFullError, match="too_many_rows"):
        engine.llm.llm_engine.add_lora(LoRARequest("huge@1", 1200, str(folder)))
    assert manager.pool.used == used and 1200 not in engine.llm.llm_engine.list_loras()


def test_an_adapter_that_breaks_the_format_is_refused(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    folder = write_adapter(tmp_path / "broken", manager.base, 7)
    (folder / "extra.txt").write_text("x")
    with pytest.raises(InvalidAdapterError, match=r"extra\.txt"):
        engine.llm.llm_engine.add_lora(LoRARequest("broken@1", 1201, str(folder)))


def test_an_expert_kernel_that_hides_the_top_k_refuses_embedded_adapters(
    engine: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    runner = manager.runners[0]
    assert embedded_problem(runner) is None and manager.base.embedded_problem is None
    monkeypatch.setattr(PerftMoERunner, "is_monolithic", True)
    problem = embedded_problem(runner)
    assert problem is not None and "monolithic expert kernel" in problem and runner.layer_name in problem
    monkeypatch.setattr(manager.step_loader, "_base", replace(manager.base, embedded_problem=problem))
    values = {key: value for key, value in RANDOM_R.items() if key not in ("top_k", "renormalize")}
    values |= {"variant": "E", "num_experts": manager.base.num_experts}
    folder = write_adapter(tmp_path / "embedded", manager.base, 8, values)
    with pytest.raises(InvalidAdapterError, match="hides the base's top-k"):
        engine.llm.llm_engine.add_lora(LoRARequest("embedded@1", 1202, str(folder)))


def test_an_id_stands_for_one_adapter_for_ever(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    mine, other = (write_adapter(tmp_path / name, manager.base, seed) for seed, name in enumerate(("mine", "other")))
    manager.add_adapter(LoRARequest("mine@1", 1300, str(mine)))
    for name, path in (("other@1", mine), ("mine@1", other)):
        with pytest.raises(AdapterIdentityError, match="never reused"):
            manager.add_adapter(LoRARequest(name, 1300, str(path)))
    assert manager.remove_adapter(1300)
    write_adapter(mine, manager.base, 9)
    with pytest.raises(OtherContentsError, match="were changed"):
        manager.add_adapter(LoRARequest("mine@1", 1300, str(mine)))


def test_a_warm_up_id_that_was_left_behind_hides_no_adapter(engine: TinyEngine, tmp_path: Path) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    manager.add_dummy_lora(LoRARequest("warmup_1", 1301, WARM_UP_PATH), 8)
    request = LoRARequest("real@1", 1301, str(write_adapter(tmp_path / "real", manager.base, 3)))
    manager.set_active_adapters({request}, LoRAMapping((1301, 0), (1301, 0)))
    assert manager.step.step._batch.tokens_n.tolist() == [0]
    manager.remove_adapter(1301)
    assert manager.step.step is None, "no plan outlives an adapter"


def test_a_token_of_an_absent_adapter_never_falls_through_to_the_base(engine: TinyEngine) -> None:
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    with pytest.raises(KeyError):
        manager._plan([0, 4242, 0])
