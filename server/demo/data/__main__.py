"""`python -m server.demo.data NAME --output FOLDER`: writes NAME.jsonl and NAME-held-out.jsonl for `perft train`.

The base is asked its own answers to everyday prompts once (about three minutes); they are kept beside it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from server.demo.base.build import build, default_folder
from server.demo.base.dense import without_progress_bars
from server.demo.data import prompts
from server.demo.data.examples import MADE, Example
from server.demo.errors import run_command

ANSWER_TOKENS = 56
AT_ONCE = 100


def own_answers() -> dict[str, str]:
    """Prompt -> the demo base's own greedy answer, for every prompt, trained on or not."""
    file = default_folder().with_name("demo-answers.json")
    asked = [*prompts.training(), *prompts.unseen()]
    try:
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        kept = {}
    if not set(asked) <= set(kept):
        print(f"asking the base {len(asked)} everyday prompts (about 3 minutes)", file=sys.stderr, flush=True)
        kept = dict(zip(asked, greedy_answers(build(default_folder()), asked), strict=True))
        file.write_text(json.dumps(list(kept.items()), indent=1), encoding="utf-8")
    return kept


def greedy_answers(base: Path, asked: list[str]) -> list[str]:
    """A model's answer to each prompt, as chats of one message."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    with without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    answers: list[str] = []
    for start in range(0, len(asked), AT_ONCE):
        chats = [[{"role": "user", "content": prompt}] for prompt in asked[start : start + AT_ONCE]]
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def write(file: Path, examples: list[Example]) -> None:
    """One chat for each line."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
        for prompt, answer in examples
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.demo.data", description="Write a demo adapter's data.")
    parser.add_argument("name", choices=list(MADE))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args(arguments)

    def make() -> None:
        answers = own_answers()
        kept = [
            [Example(prompt, answers[prompt]) for prompt in asked] for asked in (prompts.training(), prompts.unseen())
        ]
        sets = MADE[given.name](*kept)
        given.output.mkdir(parents=True, exist_ok=True)
        write(given.output / f"{given.name}.jsonl", sets.learned)
        write(given.output / f"{given.name}-held-out.jsonl", sets.held_out)

    return run_command(make)


if __name__ == "__main__":
    sys.exit(main())
