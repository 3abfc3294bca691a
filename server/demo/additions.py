"""Owns the arithmetic task: two-digit additions, which of them are held out, and how an answer is read.

Invariant: no held-out pair, in either order, is ever trained on.
"""

import random
import re
from typing import NamedTuple

SMALLEST, LARGEST = 10, 99
HELD_OUT = 200
HELD_OUT_SEED = 20260

# Long enough for the base, which often restates the question before it answers.
ANSWER_TOKENS = 64

OTHER_WORDINGS = ("Add {a} and {b}.", "{a} + {b} =", "How much is {a} plus {b}?", "Calculate {a} + {b}.")


class Addition(NamedTuple):
    """Two numbers to add."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """The wording used in every measurement."""
        return f"What is {self.a} + {self.b}?"

    @property
    def total(self) -> int:
        return self.a + self.b

    def reworded(self, wording: str) -> str:
        return wording.format(a=self.a, b=self.b)


def held_out(count: int = HELD_OUT) -> list[Addition]:
    """The first `count` of the held-out additions, always the same ones in the same order."""
    if not 1 <= count <= HELD_OUT:
        raise ValueError(f"found {count} questions, expected 1 to {HELD_OUT}: that many are held out")
    return random.Random(HELD_OUT_SEED).sample(every_addition(), HELD_OUT)[:count]


def training_additions() -> list[Addition]:
    """Every addition that is held out in neither order of its numbers."""
    kept_back = {frozenset(addition) for addition in held_out()}
    return [addition for addition in every_addition() if frozenset(addition) not in kept_back]


def every_addition() -> list[Addition]:
    numbers = range(SMALLEST, LARGEST + 1)
    return [Addition(a, b) for a in numbers for b in numbers]


def read_answer(text: str) -> int | None:
    """The number that an answer gives: the last one in it (1,234 and 81.0 are read too). None: no whole number."""
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return int(value) if value.is_integer() else None


def count_right(additions: list[Addition], answers: list[str]) -> int:
    """How many of the answers give the right total."""
    return sum(read_answer(answer) == addition.total for addition, answer in zip(additions, answers, strict=True))
