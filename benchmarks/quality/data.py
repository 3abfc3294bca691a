"""Owns the files of both tasks: train, tune (for learning rates and for choosing a checkpoint) and test."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.kinds import Nouns
from benchmarks.quality.problems import PARTS, Item, distinct, problem
from benchmarks.quality.wordnet import Synset

SIZES = {"train": 4000, "tune": 200, "test": 800}
TASKS = ("arithmetic", "kinds")
SEED = 7


def items(task: str, part: str, count: int, synsets: Sequence[Synset] = ()) -> list[Item]:
    """The items of a part, always the same. synsets: WordNet's, for `kinds`."""
    chance = random.Random(f"{SEED} {task} {part}")
    if task == "arithmetic":
        return distinct(lambda: problem(part, chance), count)
    nouns = Nouns(synsets)
    return distinct(lambda: nouns.question(part, chance), count)


def write(task: str, folder: Path, synsets: Sequence[Synset] = (), sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """Each part as JSON lines in the format of `perft train`: part -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{task}-{part}.jsonl" for part in PARTS}
    for part, file in files.items():
        if not file.is_file():
            lines = [json.dumps(item._asdict()) + "\n" for item in items(task, part, sizes[part], synsets)]
            unfinished = file.with_suffix(".new")
            unfinished.write_text("".join(lines), encoding="utf-8")
            unfinished.rename(file)
    return files
