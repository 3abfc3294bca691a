"""`python -m server.demo.training NAME|all`: trains, measures and writes the demo's adapters (`make train`).

Invariant: the weights measured after training are the ones written, bit for bit in float16.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perft.hf import PerftAdapter, attach, save, shape_of
from server.demo import additions
from server.demo.base.build import build, default_folder
from server.demo.base.dense import without_progress_bars
from server.demo.errors import DemoError, run_command
from server.demo.training import chat, prompts
from server.demo.training.chat import Example
from server.demo.training.recipes import RECIPES, Recipe
from server.demo.training.trainer import train

SHIPPED = Path(__file__).parents[1] / "adapters"
SAVED_DTYPE = torch.float16
DISTILLED_TOKENS = 56
SHOWN_TOKENS = 72
SEED = 42


def make(name: str, recipe: Recipe, folder: Path) -> None:
    """Train one adapter on the demo base, print what it learned, and write it to `folder`."""
    model, tokenizer = load_base()
    if recipe.config.variant != "E":
        use_one_expert(model)
    print(f"{name}: measuring the base", flush=True)
    measure(model, tokenizer, recipe)
    base_answers = own_answers(model, tokenizer)
    examples = [chat.encode(tokenizer, example) for example in recipe.examples(base_answers)]
    config = recipe.config.model_copy(update={"base_fingerprint": shape_of(model).fingerprint})
    torch.manual_seed(SEED)
    adapter = attach(model, config)
    print(f"{name}: training on {len(examples)} examples, {recipe.schedule.steps} steps", flush=True)
    started = time.monotonic()
    loss = train(model, adapter, examples, tokenizer.pad_token_id, recipe.schedule)
    print(f"{name}: trained in {time.monotonic() - started:.0f} s, loss {loss:.3f}; measuring it", flush=True)
    round_to_saved(adapter)
    measure(model, tokenizer, recipe)
    write(adapter, folder)


def load_base() -> tuple[Any, Any]:
    """The demo base in float32, built first if it is not there yet, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build(default_folder())
    with without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def use_one_expert(model: Any) -> None:
    """Let every token use one expert of the base: half the work, and the same function, since its experts are equal.

    Not for PERFT-E, which makes the experts differ.
    """
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


def own_answers(model: Any, tokenizer: Any) -> list[Example]:
    """The base's own answers to the everyday prompts; kept beside the base, because they take minutes."""
    file = default_folder().with_name("demo-answers.json")
    asked = prompts.training()
    try:
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        kept = {}
    if set(kept) != set(asked):
        print(f"asking the base {len(asked)} everyday prompts (about 3 minutes)", flush=True)
        kept = dict(zip(asked, chat.answers(model, tokenizer, asked, DISTILLED_TOKENS), strict=True))
        file.write_text(json.dumps(list(kept.items()), indent=1), encoding="utf-8")
    return [Example(prompt, kept[prompt]) for prompt in asked]


def measure(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Print the model's score at what the recipe teaches, and its answers to the unseen prompts."""
    if recipe.judge is None:
        asked = additions.held_out()
        given = chat.answers(model, tokenizer, [addition.question for addition in asked], additions.ANSWER_TOKENS)
        print(f"  held-out additions right: {additions.count_right(asked, given)} of {len(asked)}", flush=True)
    shown = chat.answers(model, tokenizer, prompts.unseen(), SHOWN_TOKENS)
    if recipe.judge is not None:
        print(f"  unseen prompts answered in style: {sum(map(recipe.judge, shown))} of {len(shown)}", flush=True)
    for prompt, answer in zip(prompts.unseen(), shown, strict=True):
        print(f"  {prompt} -> {answer!r}", flush=True)


def round_to_saved(adapter: PerftAdapter) -> None:
    """Round every parameter to the value that its file will hold."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter.to(SAVED_DTYPE))


def write(adapter: PerftAdapter, folder: Path) -> None:
    try:
        save(adapter, folder, SAVED_DTYPE)
    except OSError as problem:
        raise DemoError(f"cannot write the adapter to {folder}: {problem.strerror or problem}") from problem
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.2f} MB)", flush=True)


def chosen(name: str, steps: int | None) -> Iterable[tuple[str, Recipe]]:
    """The recipes to make, with `steps` instead of their own number if it is given."""
    for each in RECIPES if name == "all" else (name,):
        recipe = RECIPES[each]
        schedule = recipe.schedule if steps is None else replace(recipe.schedule, steps=steps)
        yield each, replace(recipe, schedule=schedule)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.demo.training", description="Train the demo's adapters.")
    parser.add_argument("name", choices=[*RECIPES, "all"])
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's own number)")
    parser.add_argument(
        "--output", type=Path, default=SHIPPED, help="the folder to write NAME/ into (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)

    def make_chosen() -> None:
        for name, recipe in chosen(given.name, given.steps):
            make(name, recipe, given.output / name)

    return run_command(make_chosen)


if __name__ == "__main__":
    sys.exit(main())
