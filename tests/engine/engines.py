"""Real vLLM engines for the tests: in this process (deterministic, starts in seconds), on the CPU."""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest

from perft.hf import save
from tests import tiny

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
}
NEW_TOKENS = 48


@contextmanager
def environment(**changes: str) -> Any:
    """os.environ with changes, for the duration."""
    saved = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def greedy(tokens: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False)


def prompts(count: int, seed: int = 1, longest: int = 60) -> list[list[int]]:
    """Random token ids, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class TinyEngine:
    """A tiny model served by vLLM, and the same model in transformers for the expected answers."""

    kind: str
    folder: Path
    llm: LLM
    reference: Any
    cases: list[tuple[str, str, dict[str, Any]]]
    adapters: dict[int, Path] = field(default_factory=dict)

    def request(self, case: int | None) -> LoRARequest | None:
        """The LoRA request of a case's adapter (made on first use), None for the base."""
        if case is None:
            return None
        if case not in self.adapters:
            adapter = tiny.attach_random(self.reference, self.cases[case], seed=100 + case)
            adapter.detach_from_model()
            self.adapters[case] = self.folder / f"adapter-{case}"
            save(adapter, self.adapters[case])
        return LoRARequest(f"{self.kind}-{case}@1", case + 1, str(self.adapters[case]))

    def generate(self, requests: list[tuple[list[int], int | None]], tokens: int = NEW_TOKENS) -> list[RequestOutput]:
        """All requests (prompt, case) at once."""
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            greedy(tokens),
            lora_request=[self.request(case) for _, case in requests],
            use_tqdm=False,
        )

    @torch.inference_mode()
    def expected_logprobs(self, case: int | None, sequence: list[int]) -> torch.Tensor:
        """Log-probabilities [len(sequence), V] that transformers with our modules gives after each token."""
        adapter = None if case is None else tiny.attach_random(self.reference, self.cases[case], seed=100 + case)
        try:
            return self.reference(torch.tensor([sequence])).logits[0].log_softmax(-1)
        finally:
            if adapter is not None:
                adapter.detach_from_model()

    def check(self, case: int | None, output: RequestOutput) -> None:
        """The rule of the parity tests, on the tokens the engine chose."""
        sequence = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        check_answer(self.expected_logprobs(case, sequence), output, (self.kind, case))


def check_answer(expected_TV: torch.Tensor, output: RequestOutput, what: Any) -> None:
    """Hold an answer to the log-probabilities [T, V] expected after each token of prompt and answer.

    Each token is the expected one wherever that leads the runner-up by more than 1e-3, and its log-probability
    is within 1e-3 of the expected one.
    """
    for step, token in enumerate(output.outputs[0].token_ids):
        row_V = expected_TV[len(output.prompt_token_ids) - 1 + step]
        top = row_V.topk(2)
        lead = float(top.values[0] - top.values[1])
        assert token == int(top.indices[0]) or lead <= 1e-3, (what, step, lead)
        found = output.outputs[0].logprobs[step][token].logprob
        assert abs(found - float(row_V[token])) <= 1e-3, (what, step)


def settings(folder: Path) -> dict[str, Any]:
    """What every engine of the tests is started with, PERFT or not: float32, chunked prefill, prefix caching."""
    return {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True,
        "max_model_len": 256, "max_num_seqs": 64, "seed": 0, "block_size": 32, "gpu_memory_utilization": 0.3,
        "enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 96,
        "disable_log_stats": True,
    }  # fmt: skip


PERFT_SETTINGS: dict[str, Any] = {
    "enable_lora": True, "max_loras": 64, "worker_extension_cls": "perft.engine.worker.PerftWorkerExtension",
    "additional_config": {"perft": {"pool_rows": 40_000, "expert_sampling": 1}},
    "scheduler_cls": "perft.engine.scheduler.make_scheduler",
}  # fmt: skip


def start(kind: str, folder: Path, variables: dict[str, str] | None = None, **options: Any) -> TinyEngine:
    """Build a tiny model in `folder` and start an in-process engine on it."""
    tiny.build(kind, folder / kind)
    with environment(**ENVIRONMENT | (variables or {})):
        llm = LLM(**settings(folder / kind) | PERFT_SETTINGS | options)
    return TinyEngine(kind, folder, llm, tiny.load(folder / kind), tiny.every_variant())
