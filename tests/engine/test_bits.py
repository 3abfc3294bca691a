"""The base is left alone, bit for bit: block by block, and against a vLLM that never heard of us."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from perft.engine.moe_runner import PerftMoERunner
from perft.modules import attach, save
from tests import tiny
from tests.engine.engines import ENVIRONMENT, TinyEngine, greedy, prompts

STEPS = 24


@contextmanager
def every_block(check: Any) -> Iterator[list[int]]:
    """Call `check(runner, base output, our output)` for every MoE block that runs; yields how often it did."""
    ours, calls = PerftMoERunner.forward, [0]

    def both(self: PerftMoERunner, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = MoERunner.forward(self, hidden_states.clone(), *args, **kwargs).clone()
        output = ours(self, hidden_states, *args, **kwargs)
        check(self, base, output)
        calls[0] += 1
        return output

    PerftMoERunner.forward = both  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        PerftMoERunner.forward = ours  # type: ignore[method-assign]


def test_base_tokens_of_a_mixed_batch_are_the_base_blocks_own(engine: TinyEngine) -> None:
    changed = [0]

    def check(runner: PerftMoERunner, base_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
        plan = runner.perft.plan.at(runner.layer_id) if runner.perft and runner.perft.plan else None
        planned = torch.zeros(base_TD.shape[0], dtype=torch.bool)
        if plan is not None:
            planned[plan.tokens_n] = True
            changed[0] += int((output_TD[planned] != base_TD[planned]).any(dim=-1).sum())
        assert torch.equal(output_TD[~planned], base_TD[~planned])

    requests = [(prompt, None if i % 2 else i % 7) for i, prompt in enumerate(prompts(14, seed=3))]
    with every_block(check) as calls:
        engine.generate(requests, tokens=STEPS)
    assert calls[0] >= STEPS and changed[0] > 0


def test_a_fresh_adapter_is_the_base(engine: TinyEngine, tmp_path: Path) -> None:
    def check(runner: PerftMoERunner, base_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
        assert runner.perft is not None and runner.perft.plan is not None
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


DUMP = """
import sys, torch
from vllm import LLM
from tests.engine.engines import prompts, greedy
from vllm.model_executor.layers.logits_processor import LogitsProcessor
kept, forward = [], LogitsProcessor.forward
def keep(self, *args, **kwargs):
    kept.append(forward(self, *args, **kwargs).clone())
    return kept[-1]
LogitsProcessor.forward = keep
def logits(llm):
    kept.clear()
    llm.generate([{"prompt_token_ids": p} for p in prompts(6, seed=21)], greedy(16), use_tqdm=False)
    return torch.cat(list(kept))
"""


def _run(script: str, folder: Path, out: Path, **env: str) -> dict[str, torch.Tensor]:
    """Run a script that starts an engine in a process of its own; what it saved."""
    result = subprocess.run(
        [sys.executable, "-c", DUMP + script, str(folder), str(out)],
        check=False, env={**os.environ, **ENVIRONMENT, **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out)


OPTIONS = "model=sys.argv[1], dtype='float32', enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, \
gpu_memory_utilization=0.3, enable_prefix_caching=False, disable_log_stats=True"
ABSENT = f"torch.save({{'absent': logits(LLM({OPTIONS}))}}, sys.argv[2])"
PRESENT = f"""
from pathlib import Path
from tests import tiny
from perft.modules import save
from vllm.lora.request import LoRARequest
llm = LLM({OPTIONS}, enable_lora=True, max_loras=32, worker_extension_cls="perft.engine.worker.PerftWorkerExtension")
found = {{"present": logits(llm)}}
model = tiny.load(Path(sys.argv[1]))
for i, case in enumerate(tiny.every_variant()[:8]):
    adapter = tiny.attach_random(model, case, i)
    adapter.detach_from_model()
    folder = Path(sys.argv[2]).parent / f"resident-{{i}}"
    save(adapter, folder)
    llm.llm_engine.add_lora(LoRARequest(f"a{{i}}", i + 1, str(folder)))
found["used"] = torch.tensor(llm.collective_rpc("perft_status")[0]["rows_used"])
found["resident"] = logits(llm)
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def logits_with_and_without_us(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tiny.build("mixtral", tmp_path_factory.mktemp("bits") / "model")
    absent = _run(ABSENT, folder, folder.parent / "absent.pt", VLLM_PLUGINS="")
    return absent | _run(PRESENT, folder, folder.parent / "present.pt")


@pytest.mark.parametrize("state", ["present", "resident"])
def test_base_logits_are_those_of_a_vllm_without_us(
    logits_with_and_without_us: dict[str, torch.Tensor], state: str
) -> None:
    found = logits_with_and_without_us
    assert found["used"] > 0, "adapters must be resident in the second half"
    assert found["absent"].shape == found[state].shape and torch.equal(found["absent"], found[state])
