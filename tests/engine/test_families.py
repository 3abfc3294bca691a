"""Every family served by vLLM answers as transformers with our modules does: R, S, and E where it is served."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs
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
