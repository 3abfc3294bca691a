"""The base is unchanged, bit for bit: block by block, and compared with a vLLM without PERFT."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from perft.engine.layer_classes import PerftMoERunner
from perft.hf import attach, save
from tests import tiny
from tests.engine.engines import ENVIRONMENT, TinyEngine, greedy, prompts

STEPS = 24


@contextmanager
def every_block(check: Any) -> Iterator[list[int]]:
    """Call `check(runner, base output, our output)` for every MoE block that runs; yields how often it did."""
    vllms, calls = MoERunner.forward, [0]

    def both(self: PerftMoERunner, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ours, self.routed_experts.perft = self.routed_experts.perft, None
        base = vllms(self, hidden_states.clone(), *args, **kwargs).clone()
        self.routed_experts.perft = ours
        output: torch.Tensor = vllms(self, hidden_states, *args, **kwargs)
        check(self, base, output)
        calls[0] += 1
        return output

    MoERunner.forward = both  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        MoERunner.forward = vllms  # type: ignore[method-assign]


def test_base_tokens_of_a_mixed_batch_are_the_base_blocks_own(engine: TinyEngine) -> None:
    changed = [0]

    def check(runner: PerftMoERunner, base_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
        step: Any = runner.perft.shared.step if runner.perft else None
        planned = torch.zeros(base_TD.shape[0], dtype=torch.bool)
        for group in step._batch.groups if step else ():
            if runner.layer_id in group.adapter.layers:
                planned[step._batch.tokens_n[group.start : group.stop]] = True
        if planned.any():
            changed[0] += int((output_TD[planned] != base_TD[planned]).any(dim=-1).sum())
        assert torch.equal(output_TD[~planned], base_TD[~planned])

    requests = [(prompt, None if i % 2 else i % 7) for i, prompt in enumerate(prompts(14, seed=3))]
    with every_block(check) as calls:
        engine.generate(requests, tokens=STEPS)
    assert calls[0] >= STEPS and changed[0] > 0


def test_a_fresh_adapter_is_the_base(engine: TinyEngine, tmp_path: Path) -> None:
    def check(runner: PerftMoERunner, base_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
        assert runner.perft is not None and runner.perft.shared.step is not None
        assert torch.equal(output_TD, base_TD)

    for number, variant in enumerate("REDS"):
        fresh = attach(engine.reference, tiny.adapter_config(engine.reference, variant, "lora"))
        fresh.detach_from_model()
        save(fresh, tmp_path / variant)
        request = LoRARequest(f"fresh-{variant}", 900 + number, str(tmp_path / variant))
        with every_block(check) as calls:
            engine.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts(3, seed=5)],
                greedy(STEPS),
                lora_request=request,
                use_tqdm=False,
            )
        assert calls[0] > 0


@contextmanager
def every_logit() -> Iterator[list[torch.Tensor]]:
    """Every tensor of logits that vLLM computes meanwhile."""
    forward, kept = LogitsProcessor.forward, []

    def keep(self: LogitsProcessor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(self, *args, **kwargs)
        kept.append(logits.clone())
        return logits

    LogitsProcessor.forward = keep  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        LogitsProcessor.forward = forward  # type: ignore[method-assign]


def base_logits(llm: LLM) -> torch.Tensor:
    """The logits of six base requests at once, all steps; nothing of their prompts is cached, so schedules agree."""
    assert llm.reset_prefix_cache()
    with every_logit() as kept:
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(6, seed=21)], greedy(16), use_tqdm=False)
    return torch.cat(kept)


WITHOUT_US = """
import sys, torch
from pathlib import Path
from vllm import LLM
from tests.engine.engines import settings
from tests.engine.test_bits import base_logits
llm = LLM(**settings(Path(sys.argv[1])))
from vllm.model_executor.custom_op import op_registry_oot
assert not op_registry_oot, "our layers must not be registered here"
torch.save(base_logits(llm), sys.argv[2])
"""


@pytest.mark.parametrize("engine", ["mixtral"], indirect=True)
def test_base_logits_are_those_of_a_vllm_without_us(engine: TinyEngine, tmp_path: Path) -> None:
    """Plugin absent (a process of its own), present, and present with adapters resident: the same bits."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(engine.folder / engine.kind), str(tmp_path / "absent.pt")],
        env={**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ""}, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    absent = torch.load(tmp_path / "absent.pt")
    for adapter_id in engine.llm.llm_engine.list_loras():
        engine.llm.llm_engine.remove_lora(adapter_id)
    assert engine.llm.collective_rpc("perft_status")[0]["rows_used"] == 0
    assert torch.equal(base_logits(engine.llm), absent)
    engine.generate([(prompt, i % 8) for i, prompt in enumerate(prompts(8))], tokens=2)
    assert engine.llm.collective_rpc("perft_status")[0]["rows_used"] > 0
    assert torch.equal(base_logits(engine.llm), absent)
