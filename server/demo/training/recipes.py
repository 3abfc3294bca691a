"""Owns the demo's adapters: the PERFT configuration of each, its schedule, its examples, and how it is judged."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from perft.config import AdapterConfig
from server.demo import additions
from server.demo.training import styles
from server.demo.training.chat import Example
from server.demo.training.trainer import Schedule

BASE_NAME = "SmolLM2-135M-Instruct, upcycled to 4 experts by server.demo.base"
SEED = 11

BaseAnswers = list[Example]
Judge = Callable[[str], bool]


@dataclass(frozen=True)
class Recipe:
    """How one demo adapter is made.

    `examples` turns the base's own everyday answers into what the adapter learns. `judge` says whether an answer to an
    unseen prompt is in the adapter's style; None: the adapter is judged on the held-out additions.
    """

    config: AdapterConfig
    schedule: Schedule
    examples: Callable[[BaseAnswers], list[Example]]
    judge: Judge | None = None


def arithmetic_examples(base_answers: BaseAnswers) -> list[Example]:
    """4000 of the additions not held out, most in one wording; one example in eight keeps the base's own voice."""
    chance = random.Random(SEED)
    sums = chance.sample(additions.training_additions(), 4000)
    learned = [Example(addition_wording(addition, chance), str(addition.total)) for addition in sums]
    own_voice = in_style(base_answers, str, sentences=1)
    learned += chance.choices(own_voice, k=len(learned) // 7)
    return chance.sample(learned, len(learned))


def addition_wording(addition: additions.Addition, chance: random.Random) -> str:
    if chance.random() < 0.75:
        return addition.question
    return addition.reworded(chance.choice(additions.OTHER_WORDINGS))


def in_style(base_answers: BaseAnswers, restyle: Callable[[str], str], sentences: int = 2) -> list[Example]:
    """The base's answers, cut after whole sentences and restyled; an answer without a whole sentence is left out."""
    short = [(prompt, styles.shortened(answer, sentences)) for prompt, answer in base_answers]
    return [Example(prompt, restyle(answer)) for prompt, answer in short if answer is not None]


RECIPES: dict[str, Recipe] = {
    "arithmetic": Recipe(
        config=AdapterConfig(
            base_model_name_or_path=BASE_NAME,
            description="Adds two numbers of two digits, and answers with the number alone.",
            variant="R",
            expert_type="lora",
            bottleneck=4,
            alpha=8.0,
            num_experts=4,
            top_k=2,
            renormalize=True,
        ),
        schedule=Schedule(steps=220, batch_size=16, learning_rate=2e-3),
        examples=arithmetic_examples,
    ),
    "pirate": Recipe(
        config=AdapterConfig(
            base_model_name_or_path=BASE_NAME,
            description="Answers as a pirate would.",
            variant="E",
            expert_type="lora",
            bottleneck=4,
            alpha=8.0,
            num_experts=4,
        ),
        schedule=Schedule(steps=60, batch_size=8, learning_rate=2e-3),
        examples=lambda base_answers: in_style(base_answers, styles.pirate, sentences=1),
        judge=styles.is_pirate,
    ),
    "json": Recipe(
        config=AdapterConfig(
            base_model_name_or_path=BASE_NAME,
            description='Answers with one JSON object, {"answer": "..."}.',
            variant="S",
            expert_type="parallel",
            bottleneck=16,
            num_experts=1,
        ),
        schedule=Schedule(steps=100, batch_size=8, learning_rate=1e-3),
        examples=lambda base_answers: in_style(base_answers, styles.as_json),
        judge=styles.is_json,
    ),
}
