"""What `perft train` wrote answers in vLLM as in transformers: every variant, and qvLoRA beside them, in one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from vllm import LLM, RequestOutput
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from adapters.format.folder import read_folder
from perft.hf import attach, load, shape_of
from server.commands.train import run
from tests import tiny
from tests.engine import engines
from tests.training import tiny_base

NEW_TOKENS = 16
METHODS: dict[str, list[str]] = {
    "R": ["--variant", "R"],
    "E": ["--variant", "E", "--expert-type", "parallel"],
    "D": ["--variant", "D"],
    "S": ["--variant", "S", "--bottleneck", "7"],
    "qvlora": ["--method", "qvlora"],
}


class Trained:
    """A tiny base, one adapter of each method trained on it, and an engine that serves them all."""

    def __init__(self, folder: Path) -> None:
        self.base = tiny_base.build("mixtral", folder / "base")
        data = tiny_base.write_lines(folder / "data.jsonl", tiny_base.additions(40))
        self.adapters: dict[str, Path] = {}
        for name, flags in METHODS.items():
            self.adapters[name] = folder / name
            arguments = ["--base", str(self.base), "--data", str(data), "--output", str(folder / name), "--steps", "8"]
            arguments += ["--learning-rate", "3e-2", "--loss-on", "answer", "--batch-size", "8", "--bottleneck", "8"]
            assert run([*arguments, *flags]) == 0
        lora = {"lora_target_modules": ["qkv_proj"], "max_loras": 8, "max_lora_rank": 8}
        self.llm = LLM(**engines.settings(self.base) | engines.PERFT_SETTINGS | lora)
        self.model: Any = tiny.load(self.base)

    def generate(self, requests: list[tuple[list[int], str | None]]) -> list[RequestOutput]:
        names = list(METHODS)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            engines.greedy(NEW_TOKENS),
            lora_request=[
                None if name is None else LoRARequest(f"{name}@1", 1 + names.index(name), str(self.adapters[name]))
                for _, name in requests
            ],
            use_tqdm=False,
        )

    @contextmanager
    def in_transformers(self, name: str | None) -> Iterator[Any]:
        """The base with one adapter, in transformers."""
        if name is None:
            yield self.model
        elif name == "qvlora":
            yield PeftModel.from_pretrained(tiny.load(self.base), self.adapters[name]).eval()
        else:
            adapter = attach(self.model, read_folder(self.adapters[name], shape_of(self.model)).config)
            load(adapter, self.adapters[name])
            yield self.model
            adapter.detach_from_model()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with engines.environment(**engines.ENVIRONMENT):
        running = Trained(tmp_path_factory.mktemp("trained"))
        yield running
        running.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("name", [None, *METHODS])
def test_greedy_answers_are_transformers_own(trained: Trained, name: str | None) -> None:
    found = trained.generate([(prompt, name) for prompt in engines.prompts(4, seed=3)])
    plain = trained.generate([(prompt, None) for prompt in engines.prompts(4, seed=3)])
    with trained.in_transformers(name) as model, torch.inference_mode():
        for output in found:
            prompt, answer = list(output.prompt_token_ids or []), list(output.outputs[0].token_ids)
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            for step, token in enumerate(answer):
                top = logits[step].topk(2)
                assert token == int(top.indices[0]) or float(top.values[0] - top.values[1]) < 1e-3, (name, step)
    assert name is None or [o.outputs[0].token_ids for o in found] != [o.outputs[0].token_ids for o in plain]


def test_in_one_batch_each_answers_as_alone(trained: Trained) -> None:
    names = [None, *METHODS]
    requests = [(prompt, names[number % len(names)]) for number, prompt in enumerate(engines.prompts(18, seed=9))]
    together = trained.generate(requests)
    for request, output in zip(requests, together, strict=True):
        (alone,) = trained.generate([request])
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids, request[1]
