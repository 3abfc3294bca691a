"""Owns the larger base, which takes a GPU: whether what comes out hangs on the small base's size.

It is not committed, and a GPU does not give the same weights twice: its results say of which base they are.
"""

import json
import math
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.quality import wordnet
from benchmarks.quality.base import Recipe, make_model, pretrain
from benchmarks.quality.places import BASE, BUILD, LARGER_BASE, LARGER_PRETRAINING
from perft.hf import shape_of
from perft.hf.base import load_model, load_tokenizer

LARGER = Recipe(
    hidden=256, layers=6, heads=8, expert_width=256, batch=128, pieces=4, learning_rate=2e-3, warm_up=200,
)  # fmt: skip
"""Steps are as many as the time allows; mixtures change, and the learning rate falls, at the same shares of them as in
the small base's pretraining."""
TRIED_STEPS = 40


def pretrain_larger(seconds: float) -> None:
    """Make the larger base on a GPU in about `seconds`, with the small base's tokenizer. Raises RuntimeError."""
    if not torch.cuda.is_available():
        raise RuntimeError("found no GPU, expected one: on a CPU the larger base takes days")
    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer(str(BASE))
    took = {each: _step_seconds(replace(LARGER, computed=each), tokenizer) for each in ("grouped_mm", "eager")}
    print(f"seconds a step: {took}", flush=True)
    computed = min(took, key=lambda each: took[each])
    work = BUILD / "pretraining-larger"
    tokenizer.save_pretrained(work / "tokenizer")
    recipe = replace(with_steps(int(seconds / took[computed])), computed=computed)
    pretrain(wordnet.synsets(wordnet.folder()), recipe, LARGER_BASE, work, device="cuda")
    told = json.loads((LARGER_BASE / "pretraining.json").read_text(encoding="utf-8"))
    model = load_model(str(LARGER_BASE), torch.float32)
    told |= {"device": torch.cuda.get_device_name(), "fingerprint": shape_of(model).fingerprint}
    LARGER_PRETRAINING.write_text(json.dumps(told) + "\n", encoding="utf-8")


def with_steps(steps: int) -> Recipe:
    small = Recipe()
    until = tuple(steps * end // small.steps for end in small.mixtures_until)
    return replace(LARGER, steps=steps, mixtures_until=until, decay=steps * small.decay // small.steps)


def _step_seconds(recipe: Recipe, tokenizer: Any, device: str = "cuda") -> float:
    """How long a step of the pretraining takes; infinite where experts are not computed in this way."""
    model = make_model(recipe, tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = torch.randint(2, recipe.vocabulary, (recipe.batch, recipe.length), device=device)
    try:
        for step in range(2 * TRIED_STEPS):
            if step == TRIED_STEPS:
                began = time.monotonic()
            output = model(rows, labels=rows, output_router_logits=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            output.loss.item()
    except RuntimeError as error:
        print(f"{recipe.computed}: {error}", flush=True)
        return math.inf
    return (time.monotonic() - began) / TRIED_STEPS
