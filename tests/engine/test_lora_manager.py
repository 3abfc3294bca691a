"""PEFT LoRA on attention beside PERFT, on modules that the operator opened: both kinds and the base in one batch."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from adapters.identity import lora_digest
from adapters.ref import AdapterRef
from tests.engine.engines import TinyEngine, greedy, prompts, start

RANK, ALPHA, LORA_ID = 8, 16, 700


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    running = start(
        "mixtral", tmp_path_factory.mktemp("lora"), lora_target_modules=["qkv_proj"], max_loras=4, max_lora_rank=8
    )
    yield running
    running.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def write_lora(engine: TinyEngine, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random PEFT LoRA adapter on q_proj and v_proj; its folder and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in engine.reference.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            out_features, in_features = module.weight.shape
            a = torch.randn(RANK, in_features, generator=generator) / in_features**0.5
            b = torch.randn(out_features, RANK, generator=generator) / RANK**0.5
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    folder.mkdir()
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


@torch.inference_mode()
def merged_logprobs(engine: TinyEngine, tensors: dict[str, torch.Tensor], sequence: list[int]) -> torch.Tensor:
    """What transformers gives with the LoRA merged into its weights."""
    merged = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "_A" in name]
    deltas = {
        name: tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        for name in merged
    }
    for name, delta in deltas.items():
        engine.reference.get_submodule(name).weight += delta * ALPHA / RANK
    try:
        logprobs: torch.Tensor = engine.reference(torch.tensor([sequence])).logits[0].log_softmax(-1)
        return logprobs
    finally:
        for name, delta in deltas.items():
            engine.reference.get_submodule(name).weight -= delta * ALPHA / RANK


def test_lora_perft_and_base_in_one_batch(with_lora: TinyEngine, tmp_path: Path) -> None:
    folder, tensors = write_lora(with_lora, tmp_path / "lora")
    lora = LoRARequest("lora@1", LORA_ID, str(folder))
    plan: list[Any] = [0, "lora", None, 2, "lora", 4, None, "lora"]
    requests = [lora if item == "lora" else with_lora.request(item) for item in plan]
    outputs = with_lora.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts(len(plan), seed=31)],
        greedy(24),
        lora_request=requests,
        use_tqdm=False,
    )
    manager = with_lora.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    assert manager.step_loader.bytes_read >= (folder / "adapter_model.safetensors").stat().st_size, "read inside a step"
    for item, output in zip(plan, outputs, strict=True):
        if item != "lora":
            with_lora.check(item, output)
            continue
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        expected = merged_logprobs(with_lora, tensors, prompt + answer)[len(prompt) - 1 : -1]
        for step, token in enumerate(answer):
            assert abs(output.outputs[0].logprobs[step][token].logprob - float(expected[step][token])) <= 1e-3
    assert with_lora.llm.collective_rpc("perft_status")[0]["moe_layers"] == 4


def finish(engine: TinyEngine, move: str, order: dict[str, Any], *more: Any) -> None:
    """Run a move of the workers to its end."""
    (outcome,) = engine.llm.collective_rpc(f"perft_{move}", args=(order, *more))
    while outcome["state"] == "running":
        time.sleep(0.01)
        (outcome,) = engine.llm.collective_rpc("perft_outcome", args=(move, order))
    assert outcome["state"] == "done", outcome


def test_a_lora_adapter_is_loaded_by_order_and_read_once(with_lora: TinyEngine, tmp_path: Path) -> None:
    folder, tensors = write_lora(with_lora, tmp_path / "lora")
    number = LORA_ID + 1
    order = {"name": f"lora@{number}", "engine_id": number, "kind": "LORA"}
    order |= {"digest": lora_digest(folder), "folder": str(folder)}
    manager = with_lora.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    read_in_steps = manager.step_loader.bytes_read
    finish(with_lora, "prepare", order)
    finish(with_lora, "place", order, [])
    shutil.rmtree(folder)
    request = LoRARequest(f"lora@{number}", number, str(folder))
    (output,) = with_lora.llm.generate(
        [{"prompt_token_ids": prompts(1, seed=32)[0]}], greedy(12), lora_request=[request], use_tqdm=False
    )
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    expected = merged_logprobs(with_lora, tensors, prompt + answer)[len(prompt) - 1 : -1]
    for step, token in enumerate(answer):
        assert abs(output.outputs[0].logprobs[step][token].logprob - float(expected[step][token])) <= 1e-3
    assert number in manager.list_adapters() and manager.step_loader.bytes_read == read_in_steps
    with_lora.llm.collective_rpc("perft_evict", args=(order,))
    assert number not in manager.list_adapters()
    finish(with_lora, "place", order, [])
    assert number in manager.list_adapters(), "the host still had it"
    for method, argument in (("perft_evict", order), ("perft_drop", order), ("perft_forget", number)):
        with_lora.llm.collective_rpc(method, args=(argument,))
    assert number not in manager._kinds and not manager._lora_loader.has_read(number)


def inventory(engine: TinyEngine) -> dict[str, Any]:
    (held,) = engine.llm.collective_rpc("perft_inventory")
    return dict(held)


def test_the_inventory_lists_lora_adapters_too(with_lora: TinyEngine, tmp_path: Path) -> None:
    before = inventory(with_lora)
    folder, _ = write_lora(with_lora, tmp_path / "lora")
    number = LORA_ID + 2
    order = {"name": f"lora@{number}", "engine_id": number, "kind": "LORA"}
    order |= {"digest": lora_digest(folder), "folder": str(folder)}
    key = AdapterRef.from_wire(order).key
    assert key == f"{order['digest']}/{number}" and key not in before["host"] + before["device"]
    finish(with_lora, "prepare", order)
    prepared = inventory(with_lora)
    assert key in prepared["host"] and prepared["device"] == before["device"]
    finish(with_lora, "place", order, [])
    placed = inventory(with_lora)
    assert key in placed["host"] and key in placed["device"] and placed["moving"] == []
    assert placed["rows_used"] == before["rows_used"]
    for method in ("perft_evict", "perft_evict_key"):
        finish(with_lora, "place", order, [])
        with_lora.llm.collective_rpc(method, args=(key if method.endswith("key") else order,))
        assert inventory(with_lora) == prepared
    for _ in range(2):
        for method in ("perft_evict_key", "perft_drop_key"):
            with_lora.llm.collective_rpc(method, args=(key,))
        assert inventory(with_lora) == before, "a key that is not held is ignored"
    with_lora.llm.collective_rpc("perft_forget", args=(number,))


def test_a_lora_adapter_that_a_step_loaded_is_listed_and_can_be_freed(with_lora: TinyEngine, tmp_path: Path) -> None:
    folder, _ = write_lora(with_lora, tmp_path / "lora")
    number = LORA_ID + 3
    before = inventory(with_lora)
    with_lora.llm.llm_engine.add_lora(LoRARequest(f"lora@{number}", number, str(folder)))
    assert inventory(with_lora)["device"] == sorted([*before["device"], f"unknown/{number}"])
    with_lora.llm.collective_rpc("perft_evict_key", args=(f"unknown/{number}",))
    assert inventory(with_lora) == before


def test_lora_files_that_were_changed_are_not_served(with_lora: TinyEngine, tmp_path: Path) -> None:
    folder, _ = write_lora(with_lora, tmp_path / "lora")
    order = {"name": "lora@9", "engine_id": 9999, "kind": "LORA", "digest": "0" * 64, "folder": str(folder)}
    with pytest.raises(AssertionError, match=r"its files were changed"):
        finish(with_lora, "prepare", order)


def test_a_lora_adapter_of_another_servers_modules_is_not_half_served(with_lora: TinyEngine, tmp_path: Path) -> None:
    """It was accepted by a server that had opened o_proj too; vLLM would load it and drop those tensors silently."""
    folder, tensors = write_lora(with_lora, tmp_path / "lora")
    for factor in "AB":
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight"
        tensors[name.replace("q_proj", "o_proj")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    order = {"name": "lora@8", "engine_id": 9998, "kind": "LORA", "digest": lora_digest(folder), "folder": str(folder)}
    with pytest.raises(AssertionError, match=r"InvalidAdapterError: .*2 violations"):
        finish(with_lora, "prepare", order)
