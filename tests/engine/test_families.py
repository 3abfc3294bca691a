"""Every family served by vLLM answers as transformers with our modules does: R, S, and E where it is served."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs, RequestOutput
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from tests import families
from tests.engine import engines
from tests.engine.reference_process import Case, ReferenceProcess

CASES: list[Case] = [("R", "lora", {}), ("S", "parallel", {}), ("E", "lora", {})]
NO_EMBEDDED = ("llama4_text",)
SEED = 100


class FamilyEngine(engines.TinyEngine):
    """A tiny model of a family in vLLM; what is expected comes from `reference`, a process of its own."""

    def request(self, case: int | None) -> LoRARequest | None:
        if case is None:
            return None
        if case not in self.adapters:
            self.adapters[case] = self.folder / f"adapter-{case}"
            self.reference.save_adapter(self.base, self.cases[case], SEED + case, self.adapters[case])
        return LoRARequest(f"{self.kind}-{case}@1", case + 1, str(self.adapters[case]))

    def expected_logprobs(self, case: int | None, sequence: list[int]) -> torch.Tensor:
        chosen = None if case is None else self.cases[case]
        found: torch.Tensor = self.reference.logprobs(self.base, chosen, SEED + (case or 0), sequence)
        return found

    def check(self, case: int | None, output: RequestOutput) -> None:
        """In bfloat16: by the median step, whose log-probability must be this adapter's and not the base's."""
        if self.kind not in families.IN_BFLOAT16:
            super().check(case, output)
            return
        sequence = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        off = self._off(output, self.expected_logprobs(case, sequence))
        assert off <= 0.1, (self.kind, case, off)
        if case is not None:
            assert self._off(output, self.expected_logprobs(None, sequence)) > 5 * off, (self.kind, case, off)

    @staticmethod
    def _off(output: RequestOutput, expected_TV: torch.Tensor) -> float:
        """Of the answer's steps: the median distance of the token's log-probability from the expected one."""
        answer, first = output.outputs[0], len(output.prompt_token_ids) - 1
        distances = [
            abs(answer.logprobs[step][token].logprob - float(expected_TV[first + step, token]))
            for step, token in enumerate(answer.token_ids)
        ]
        return statistics.median(distances)

    @property
    def base(self) -> Path:
        return self.folder / "base"


@pytest.fixture(scope="module")
def reference() -> Iterator[ReferenceProcess]:
    running = ReferenceProcess()
    yield running
    running.close()


@pytest.fixture(scope="module", params=[kind for kind in families.FAMILIES if kind not in families.NOT_SERVED_ON_CPUS])
def engine(
    request: pytest.FixtureRequest, reference: ReferenceProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FamilyEngine]:
    folder = tmp_path_factory.mktemp(request.param)
    families.build(request.param, folder / "base")
    cases = CASES[:2] if request.param in NO_EMBEDDED else CASES
    settings = engines.settings(folder / "base") | engines.PERFT_SETTINGS
    if request.param in families.IN_BFLOAT16:
        settings["dtype"] = "bfloat16"
    with engines.environment(**engines.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": own_process(settings)}):
        llm: Any = engines.LLM(**settings)
        yield FamilyEngine(request.param, folder, llm, reference, list(cases))
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def own_process(settings: dict[str, Any]) -> str:
    """ "1" where vLLM takes transformers' classes and changes them, which every later test would meet; else "0"."""
    return str(int(EngineArgs(**settings).create_model_config().using_transformers_backend()))


def test_every_adapter_answers_as_transformers_does(engine: FamilyEngine) -> None:
    choice = [None, *range(len(engine.cases))]
    requests = [(prompt, choice[i % len(choice)]) for i, prompt in enumerate(engines.prompts(12, seed=5))]
    answers = engine.generate(requests, tokens=16)
    plain = engine.generate([(prompt, None) for prompt, _ in requests], tokens=16)
    changed = {case: False for case in choice if case is not None}
    for (_, case), output, without in zip(requests, answers, plain, strict=True):
        engine.check(case, output)
        if case is not None:
            changed[case] |= output.outputs[0].token_ids != without.outputs[0].token_ids
    assert all(changed.values()), changed
