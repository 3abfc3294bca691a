"""An adapter whose weights are finite but enormous fails its own request, and no other request sees its values."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from perft.config import AdapterConfig
from tests.engine.engines import TinyEngine, greedy, prompts

ENORMOUS = 1e30
IDS = count(5000)


@pytest.fixture
def enormous(engine: TinyEngine, tmp_path: Path) -> LoRARequest:
    return write_enormous_adapter(engine, tmp_path)


def write_enormous_adapter(engine: TinyEngine, folder: Path) -> LoRARequest:
    """An adapter that FORMAT allows: every value finite, scale times the largest too."""
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    values = {"base_model_name_or_path": "x", "variant": "S", "expert_type": "lora", "bottleneck": 1, "alpha": 65536.0}
    config = AdapterConfig.model_validate({**values, "num_experts": 1})
    shapes = config.tensor_shapes(config.layer_indices(manager.base.moe_layers), manager.base.hidden_size)
    folder.joinpath("adapter_config.json").write_text(config.file_json())
    save_file({n: torch.full(s, ENORMOUS) for n, s in shapes.items()}, folder / "adapter_model.safetensors")
    number = next(IDS)
    return LoRARequest(f"enormous@{number}", number, str(folder))


def cached_values(engine: TinyEngine) -> list[torch.Tensor]:
    """The KV cache of every attention layer."""
    context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [getattr(layer, "kv_cache", None) for layer in context.values()]
    return [cache for cache in caches if isinstance(cache, torch.Tensor) and cache.numel()]


def answers(engine: TinyEngine, requests: list[tuple[list[int], Any]]) -> list[Any]:
    return engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        greedy(16),
        lora_request=[lora for _, lora in requests],
        use_tqdm=False,
    )


def test_an_enormous_adapter_ends_its_own_request_alone(engine: TinyEngine, enormous: LoRARequest) -> None:
    others = [(prompt, engine.request(None if i % 3 == 0 else i % 3)) for i, prompt in enumerate(prompts(9, seed=8))]
    long_prompt = (prompts(1, seed=9)[0] * 200)[:200]
    before = answers(engine, others)
    mixed = answers(engine, [*others[:5], (long_prompt, enormous), *others[5:]])
    poisoned = mixed.pop(5)
    assert poisoned.outputs[0].finish_reason == "error" and list(poisoned.outputs[0].token_ids) == []
    after = answers(engine, others)
    for outputs in (mixed, after):
        for expected, found in zip(before, outputs, strict=True):
            assert found.outputs[0].finish_reason == "length"
            assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_nothing_poisoned_stays_of_a_request_that_was_aborted_in_its_step(
    engine: TinyEngine, enormous: LoRARequest
) -> None:
    core = engine.llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    answers(engine, [(prompts(1, seed=12)[0], None)])
    cached = sum(block.block_hash is not None for block in blocks)
    prompt = (prompts(1, seed=13)[0] * 200)[:200]
    engine.llm.llm_engine.add_request("left", {"prompt_token_ids": prompt}, greedy(16), lora_request=enormous)
    core.aborts_queue.put_nowait(list(scheduler.requests))  # as when a client disconnects while the step runs
    engine.llm.llm_engine.step()
    assert not scheduler.requests
    engine.llm.llm_engine.abort_request(["left"])
    assert sum(block.block_hash is not None for block in blocks) == cached, "a poisoned block can be found again"
    assert not all(torch.isfinite(cache).all() for cache in cached_values(engine)), "it poisoned nothing"
    answers(engine, [(prompts(1, seed=14)[0], None)])
    assert all(torch.isfinite(cache).all() for cache in cached_values(engine))
    assert not scheduler._freed


def test_nothing_poisoned_stays_in_the_cache(engine: TinyEngine, enormous: LoRARequest) -> None:
    prompt = (prompts(1, seed=10)[0] * 200)[:200]
    blocks = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.blocks
    answers(engine, [(prompt, None)])
    cached = sum(block.block_hash is not None for block in blocks)
    assert cached >= 200 // 32
    (poisoned,) = answers(engine, [(prompt, enormous)])
    assert poisoned.outputs[0].finish_reason == "error"
    assert sum(block.block_hash is not None for block in blocks) == cached, "a poisoned block can be found again"
    answers(engine, [(prompts(1, seed=11)[0], None)])
    caches = cached_values(engine)
    assert caches and all(torch.isfinite(cache).all() for cache in caches)
