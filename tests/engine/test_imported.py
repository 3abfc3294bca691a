"""A published checkpoint, imported, answers in vLLM as the authors' maths do, restated in tests/convert/authors.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from server.commands.convert import run_import
from tests import tiny
from tests.convert import authors
from tests.engine import engines
from tests.engine.engines import TinyEngine

NUMBERS = count(20_000)
"""Of adapters in the engines that all tests of the session share."""
TOKENS = 16


@contextmanager
def authors_model(engine: TinyEngine, config: dict[str, Any], tensors: authors.Tensors) -> Iterator[Any]:
    """The base in transformers, with the authors' delta added to the output of every MoE block."""
    base = engine.reference.config
    renormalizes = engine.kind == "mixtral" or bool(base.norm_topk_prob)

    def added(layer: int) -> Any:
        def hook(block: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x_TD = inputs[0].flatten(0, 1)
            logits_TN = x_TD @ block.gate.weight.T
            delta_TD = authors.delta(
                engine.kind, config, tensors, layer, x_TD, logits_TN, base.num_experts_per_tok, renormalizes
            )
            return output + delta_TD.view_as(output)

        return hook

    layers = engine.reference.model.layers
    hooks = [layer.mlp.register_forward_hook(added(number)) for number, layer in enumerate(layers)]
    yield engine.reference
    for hook in hooks:
        hook.remove()


def check(engine: TinyEngine, tmp_path: Path, variant: str, kind: str, **sizes: Any) -> None:
    """Import a random checkpoint of the base's architecture, serve it, and hold its answers to the authors' maths."""
    base_experts = engine.reference.model.layers[0].mlp.gate.weight.shape[0]
    config, tensors = authors.checkpoint(
        engine.kind, variant, kind, layers=tiny.LAYERS, hidden=64, base_experts=base_experts, **sizes
    )
    published = authors.write(tmp_path / "published", config, tensors)
    adapter = tmp_path / "adapter"
    assert run_import([str(published), "--base", str(engine.folder / engine.kind), "--output", str(adapter)]) == 0
    number = next(NUMBERS)
    request = LoRARequest(f"imported-{number}@1", number, str(adapter))
    prompts = [{"prompt_token_ids": prompt} for prompt in engines.prompts(3, seed=number)]
    found = engine.llm.generate(prompts, engines.greedy(TOKENS), lora_request=request, use_tqdm=False)
    plain = engine.llm.generate(prompts, engines.greedy(TOKENS), use_tqdm=False)
    engine.llm.llm_engine.remove_lora(number)
    with authors_model(engine, config, tensors) as model, torch.inference_mode():
        for output in found:
            sequence = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            expected = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
            engines.check_answer(expected, output, (engine.kind, variant, kind, sizes))
    assert [o.outputs[0].token_ids for o in found] != [o.outputs[0].token_ids for o in plain]


@pytest.mark.parametrize("engine", ["mixtral", "olmoe"], indirect=True)
@pytest.mark.parametrize(("variant", "kind"), product("SDRE", ("LoRA", "Parallel_Adapter")))
def test_every_kind_of_checkpoint_answers_as_the_authors_maths(
    engine: TinyEngine, tmp_path: Path, variant: str, kind: str
) -> None:
    check(engine, tmp_path, variant, kind)


@pytest.mark.parametrize("engine", ["olmoe"], indirect=True)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_olmoe_weights_routed_experts_by_the_base(engine: TinyEngine, tmp_path: Path, top_k: int) -> None:
    """With as many of its own experts as the base takes, too."""
    check(engine, tmp_path, "R", "LoRA", experts=5, top_k=top_k)
