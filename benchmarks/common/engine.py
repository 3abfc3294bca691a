"""Owns an engine in this process, stepped by hand: every decode step is timed alone, after all prefill is done.

Invariant: a timed step gives each request of the segment exactly one token; anything else raises.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.workload import PROMPT_TOKENS, prompt
from perft.base_model import BaseShape
from server.demo.__main__ import ENVIRONMENT as DEMO_ENVIRONMENT
from server.engine.cpu import IN_ENGINE

ENVIRONMENT = {
    **DEMO_ENVIRONMENT,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
SETTLING_STEPS = 2
"""Decode steps after the last prefill that are not timed: vLLM may still overlap them."""
MAX_LORAS = 64


@dataclass(frozen=True)
class Segment:
    """One batch, decoded. first_token_s: for each request, seconds from the batch's start. step_s: each decode step."""

    first_token_s: list[float]
    step_s: list[float]

    @property
    def step_ms(self) -> float:
        """The median decode step."""
        return 1000 * statistics.median(self.step_s)

    @property
    def tokens_per_second(self) -> float:
        """Decode throughput."""
        return 1000 * len(self.first_token_s) / self.step_ms

    def as_json(self) -> dict[str, Any]:
        return {
            "step_ms": [round(1000 * value, 2) for value in self.step_s],
            "first_token_ms": [round(1000 * value, 1) for value in self.first_token_s],
        }


def set_environment() -> None:
    """What engines on the CPU need; must come before vLLM and torch are imported by an engine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def engine_options(base: Path) -> dict[str, Any]:
    """What every engine is started with, PERFT or not: as the demo serves, but no prefix caching (prompts repeat)."""
    return {
        "model": str(base), "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.5, "enable_prefix_caching": False, "disable_log_stats": True,
        "distributed_executor_backend": IN_ENGINE, "seed": 0,
    }  # fmt: skip


def perft_options(pool_rows: int) -> dict[str, Any]:
    """What `perft serve` adds."""
    from server.hosting.arguments import SCHEDULER, WORKER_EXTENSION

    return {
        "enable_lora": True, "max_loras": MAX_LORAS, "worker_extension_cls": WORKER_EXTENSION,
        "scheduler_cls": SCHEDULER, "additional_config": {"perft": {"pool_rows": pool_rows}},
    }  # fmt: skip


class BenchEngine:
    """A vLLM engine in this process. `llm`: vLLM's LLM. An adapter is known by the number that `load` gave."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.vocabulary: int = llm.llm_engine.model_config.get_vocab_size()
        self._loaded: list[Any] = []
        self._batches = 0

    @classmethod
    def start(cls, base: Path, pool_rows: int, **options: Any) -> "BenchEngine":
        """An engine with PERFT, as `perft serve` sets it up. pool_rows: what all adapters of the benchmark take."""
        set_environment()
        os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
        return cls._make(engine_options(base) | perft_options(pool_rows) | options)

    @classmethod
    def start_plain(cls, base: Path, **options: Any) -> "BenchEngine":
        """An engine without LoRA."""
        set_environment()
        return cls._make(engine_options(base) | options)

    @classmethod
    def _make(cls, options: dict[str, Any]) -> "BenchEngine":
        from vllm import LLM

        return cls(LLM(**options))

    @property
    def base(self) -> BaseShape:
        from server.engine.vllm import base_shape_of

        return base_shape_of(self.llm.collective_rpc("perft_status")[0]["base"])

    def load(self, folders: Sequence[Path]) -> list[int]:
        """Put adapters on the device; their numbers."""
        from vllm.lora.request import LoRARequest

        numbers: list[int] = []
        for folder in folders:
            number = len(self._loaded)
            self._loaded.append(LoRARequest(f"bench-{number}@1", number + 1, str(folder)))
            self.put_back([number])
            numbers.append(number)
        return numbers

    def put_back(self, numbers: Sequence[int]) -> None:
        """Load adapters again that `remove` took off the device."""
        for number in numbers:
            self.llm.llm_engine.add_lora(self._loaded[number])

    def remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.llm.llm_engine.remove_lora(self._loaded[number].lora_int_id)

    def close(self) -> None:
        """End the engine and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def decode(
        self,
        adapters: Sequence[int | None],
        steps: int,
        prompt_tokens: int = PROMPT_TOKENS,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> Segment:
        """Start one request for each entry of `adapters` (None: the base) at once, time `steps` decode steps, abort
        them all. `before` and `after` are called around the timed steps."""
        engine = self.llm.llm_engine
        ids, began, first = self._begin(adapters, prompt_tokens, SETTLING_STEPS + steps + len(adapters) + 8)
        for _ in range(SETTLING_STEPS):
            engine.step()
        took: list[float] = []
        before()
        for _ in range(steps):
            start = time.perf_counter()
            outputs = engine.step()
            took.append(time.perf_counter() - start)
            if len(outputs) != len(ids):
                raise RuntimeError(f"found {len(outputs)} tokens in a decode step, expected {len(ids)}")
        after()
        engine.abort_request(ids)
        while engine.has_unfinished_requests():
            engine.step()
        return Segment([first[each] - began for each in ids], took)

    @contextmanager
    def requests(self, adapters: Sequence[int | None]) -> Iterator[None]:
        """Requests that go on decoding with every `step`, aborted at the end."""
        ids, _, _ = self._begin(adapters, PROMPT_TOKENS, 1000)
        try:
            yield
        finally:
            self.llm.llm_engine.abort_request(ids)
            while self.llm.llm_engine.has_unfinished_requests():
                self.step()

    def step(self) -> None:
        """One step of the engine."""
        self.llm.llm_engine.step()

    def prefill(self, adapter: int | None, tokens: int) -> float:
        """Seconds from the start of one request with a prompt of `tokens` to its first token."""
        return self.decode([adapter], 0, tokens).first_token_s[0]

    def generate(self, adapters: Sequence[int | None], tokens: int) -> float:
        """Seconds in which every request, all started at once, gets `tokens` tokens; prefill included."""
        engine = self.llm.llm_engine
        _, began, _ = self._begin(adapters, PROMPT_TOKENS, tokens)
        while engine.has_unfinished_requests():
            engine.step()
        return time.perf_counter() - began

    def _begin(
        self, adapters: Sequence[int | None], prompt_tokens: int, tokens: int
    ) -> tuple[list[str], float, dict[str, float]]:
        """Start requests and step until each has a first token: their ids, the start, when each first token came
        (perf_counter seconds)."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        first: dict[str, float] = {}
        ids: list[str] = []
        self._batches += 1
        began = time.perf_counter()
        for place, number in enumerate(adapters):
            given = {"prompt_token_ids": prompt(place, self.vocabulary, prompt_tokens)}
            lora = None if number is None else self._loaded[number]
            ids.append(f"{self._batches}-{place}")
            engine.add_request(ids[-1], given, sampling.clone(), lora_request=lora)
        while len(first) < len(ids):
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter())
        return ids, began, first
