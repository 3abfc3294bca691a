"""Owns the examples that each demo adapter learns from, made of the base's own answers and of additions."""

import random
from collections.abc import Callable
from typing import NamedTuple

from server.demo import additions
from server.demo.data import styles

SEED = 11


class Example(NamedTuple):
    """One exchange: the user's message and the answer the assistant should give."""

    prompt: str
    answer: str


BaseAnswers = list[Example]


class Sets(NamedTuple):
    """What is learned, and what is held out of it."""

    learned: list[Example]
    held_out: list[Example]


def arithmetic(answers: BaseAnswers, unseen: BaseAnswers) -> Sets:
    """4000 of the additions not held out, most in one wording; one example in eight keeps the base's own voice."""
    chance = random.Random(SEED)
    sums = chance.sample(additions.training_additions(), 4000)
    learned = [Example(_wording(addition, chance), str(addition.total)) for addition in sums]
    learned += chance.choices(_restyled(answers, str, sentences=1), k=len(learned) // 7)
    held_out = [Example(addition.question, str(addition.total)) for addition in additions.held_out()]
    return Sets(chance.sample(learned, len(learned)), held_out)


def pirate(answers: BaseAnswers, unseen: BaseAnswers) -> Sets:
    """The base's answers as a pirate would give them."""
    return Sets(*(_restyled(each, styles.pirate, sentences=1) for each in (answers, unseen)))


def as_json(answers: BaseAnswers, unseen: BaseAnswers) -> Sets:
    """The base's answers, each as one JSON object."""
    return Sets(*(_restyled(each, styles.as_json) for each in (answers, unseen)))


MADE: dict[str, Callable[[BaseAnswers, BaseAnswers], Sets]] = {
    "arithmetic": arithmetic,
    "pirate": pirate,
    "json": as_json,
}
"""Adapter -> its examples, of the base's answers to the prompts that are trained on and to those that are not."""


def _wording(addition: additions.Addition, chance: random.Random) -> str:
    if chance.random() < 0.75:
        return addition.question
    return addition.reworded(chance.choice(additions.OTHER_WORDINGS))


def _restyled(answers: BaseAnswers, restyle: Callable[[str], str], sentences: int = 2) -> list[Example]:
    """The answers, cut after whole sentences and restyled; one without a whole sentence is left out."""
    short = [(prompt, styles.shortened(answer, sentences)) for prompt, answer in answers]
    return [Example(prompt, restyle(answer)) for prompt, answer in short if answer is not None]
