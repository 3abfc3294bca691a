"""Owns where wrong answers to the arithmetic problems go wrong first: at a quantity that was said, at a sign, at a
result, or at where the calculation ends; and how many bare calculations a model still gets right.

Adapters are read from build/quality/runs, so this is done where the runs were done.
"""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.figures import cells
from benchmarks.quality.grid import BASE, Run
from benchmarks.quality.places import BASE as SMALL_BASE
from benchmarks.quality.places import BUILD, LARGER_BASE
from benchmarks.quality.runs import task_files, with_adapter
from perft.hf.base import load_model, load_tokenizer
from perft.training.data import read_examples
from perft.training.encoding import IGNORED, Encoded, encode_all
from perft.training.order import collated
from perft.training.scoring import next_tokens, score

FOLDERS = {"small": SMALL_BASE, "larger": LARGER_BASE}
KINDS = ("quantity", "sign", "result", "end")
BATCH = 100
FACTS, FACTS_SEED = 400, 3
PROBLEMS = 200
"""The first ones of the test."""


def measured(results: Mapping[str, Any], runs: Path = BUILD / "runs") -> dict[str, dict[str, Any]]:
    """Name of a run -> how many test problems first go wrong where; of the runs on the page that are still there.

    Of a base as it is the bare calculations alone, by the name of its run.
    """
    examples = read_examples([task_files("arithmetic")["test"]])
    found: dict[str, dict[str, Any]] = {}
    for base, folder in FOLDERS.items():
        if not folder.is_dir():
            continue  # the larger base, where nobody made it
        tokenizer = load_tokenizer(str(folder))
        encoded = encode_all(tokenizer, examples, "chat", "answer", 256, "error")[:PROBLEMS]
        plain = load_model(str(folder), torch.float32)
        found[Run(base, "arithmetic", BASE).name] = {"facts": facts_right(plain, tokenizer)}
        for cell in cells(results, base, "arithmetic"):
            for seed in cell.seeds:
                name = Run(base, "arithmetic", cell.method, cell.budget, cell.rate, seed).name
                if (runs / name / "adapter_config.json").is_file():
                    model = with_adapter(load_model(str(folder), torch.float32), cell.method, runs / name)
                    found[name] = {
                        "base": base, "method": cell.method, "budget": cell.budget, "seed": seed,
                        "problems": len(encoded), "first_mistakes": first_mistakes(model, tokenizer, encoded),
                        "facts": facts_right(model, tokenizer),
                    }  # fmt: skip
    return found


def facts_right(model: Any, tokenizer: Any) -> float:
    """Share of bare calculations, as the base was pretrained on and without a question, whose result is right."""
    chance, encoded = random.Random(FACTS_SEED), []
    for _ in range(FACTS):
        a, b = chance.randint(6, 30), chance.randint(6, 30)
        fact = f"{a} + {b} = " if chance.random() < 0.5 else f"{max(a, b)} - {min(a, b)} = "
        result = a + b if "+" in fact else abs(a - b)
        asked = tokenizer.encode(fact.strip(), add_special_tokens=False)
        said = tokenizer.encode(f" {result}", add_special_tokens=False)
        eos = tokenizer.eos_token_id
        encoded.append(Encoded([eos, *asked, *said], [IGNORED] * (1 + len(asked)) + said))
    return score(model, encoded, BATCH, tokenizer.pad_token_id, torch.device("cpu")).accuracy


@torch.no_grad()
def first_mistakes(model: Any, tokenizer: Any, encoded: list[Encoded]) -> dict[str, int]:
    """Kind of the first wrong token -> problems."""
    counted: Counter[str] = Counter()
    for start in range(0, len(encoded), BATCH):
        logits, labels = next_tokens(model, collated(encoded[start : start + BATCH], tokenizer.pad_token_id))
        for guesses, wanted in zip(logits.argmax(dim=-1), labels, strict=True):
            is_learned = wanted != IGNORED
            tokens = [str(tokenizer.decode(token)).strip() for token in wanted[is_learned].tolist()]
            wrong = (guesses[is_learned] != wanted[is_learned]).nonzero().flatten().tolist()
            if wrong:
                counted[kind_of(tokens, wrong[0])] += 1
    return {kind: counted[kind] for kind in KINDS}


def kind_of(tokens: list[str], place: int) -> str:
    """What the token at `place` of a calculation is."""
    if tokens[place] in ("+", "-", "*"):
        return "sign"
    if tokens[place].isdigit():
        before = next((each for each in reversed(tokens[:place]) if not each.isdigit()), "")
        return "result" if before == "=" else "quantity"
    return "end"
