"""Owns the arithmetic word problems: one or two operations, told in many ways; answers as LLM-Adapters' have them, a
calculation whose last number is the result.

Invariant: the parts (train, tune, test) share no name, no thing and no quantity, and so no problem. Ways of telling
and multipliers (2 to 5) are shared.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.quality.words import HELD_NAMES, HELD_THINGS, NAMES, THINGS

PARTS = ("train", "tune", "test")
_PART_OF_REMAINDER = {0: "test", 4: "test", 2: "tune"}
SMALLEST, LARGEST, LARGEST_FACTOR = 6, 30, 12
MULTIPLIERS = range(2, 6)


class Item(NamedTuple):
    """One question of a task and its only right answer."""

    prompt: str
    completion: str


def part_of_quantity(number: int) -> str:
    """The one part whose problems say this quantity."""
    return _PART_OF_REMAINDER.get(number % 7, "train")


QUANTITIES = {part: [n for n in range(SMALLEST, LARGEST + 1) if part_of_quantity(n) == part] for part in PARTS}
PEOPLE = {"train": NAMES[:-12], "tune": NAMES[-12:], "test": HELD_NAMES}
_COUNTED = tuple(thing for thing in THINGS if thing not in ("boxes", "bags"))
"""Not what the ways of telling put things into."""
GOODS = {"train": _COUNTED[:-10], "tune": _COUNTED[-10:], "test": HELD_THINGS}

HAS = ("{x} has {a} {t}.", "{x} owns {a} {t}.", "There are {a} {t} in {x}'s bag.", "{x} keeps {a} {t} at home.",
       "At first {x} has {a} {t}.")  # fmt: skip
TIMES = ("{x} has {k} boxes with {a} {t} each.", "{x} fills {k} bags, and each holds {a} {t}.",
         "There are {k} rows of {a} {t} in {x}'s garden.", "{x} gets {a} {t} on each of {k} days.")  # fmt: skip
GAINS = ("{x} buys {b} more.", "{y} gives {x} {b} more.", "Then {x} finds {b} {t}.", "{x} gets {b} {t} from {y}.",
         "{b} more {t} come by post.", "{x} picks up another {b}.")  # fmt: skip
LOSSES = ("{x} loses {b} of them.", "{x} gives {b} {t} to {y}.", "Then {y} takes {b} {t} away.",
          "{x} sells {b}.", "{b} of the {t} break.", "{x} throws {b} {t} out.")  # fmt: skip
LEFT = ("How many {t} does {x} have now?", "How many {t} are there now?", "What is the number of {t} in the end?",
        "How many {t} is that?")  # fmt: skip
TOGETHER = ("How many {t} do {x} and {y} have together?", "How many {t} is that in all?")
MORE = ("{y} has {b} more {t} than {x}.", "{y} has as many and {b} besides.")
FEWER = ("{y} has {b} fewer {t} than {x}.", "{b} {t} less than that is what {y} has.")
HIS = ("How many {t} does {y} have?", "What is the number of {y}'s {t}?")
ASIDE = ("{y} likes {t}.", "{z} has {d} {u}.", "{x} is {d} years old.", "The bus comes at {d}.")


def problem(part: str, chance: random.Random) -> Item:
    """One problem of a part."""
    kind = chance.choice((_one_event, _one_event, _two_events, _times, _times_and_event, _together, _compared))
    return kind(_Teller(part, chance))


class _Teller:
    """Draws the people, the things and the quantities of one problem, and tells it."""

    def __init__(self, part: str, chance: random.Random) -> None:
        self.part, self.chance = part, chance
        x, y, z = chance.sample(PEOPLE[part], 3)
        t, u = chance.sample(GOODS[part], 2)
        self.words = {"x": x, "y": y, "z": z, "t": t, "u": u}

    def quantity(self, most: int = LARGEST) -> int:
        return self.chance.choice([n for n in QUANTITIES[self.part] if n <= most])

    def say(self, ways: tuple[str, ...], **numbers: int) -> str:
        return self.chance.choice(ways).format(**self.words, **numbers)

    def item(self, told: list[str], question: tuple[str, ...], *calculation: str) -> Item:
        if self.chance.random() < 0.3:
            told.insert(self.chance.choice((0, len(told))), self.say(ASIDE, d=self.quantity()))
        text = " ".join(told)
        return Item(f"{text[0].upper()}{text[1:]} {self.say(question)}", ", ".join(calculation))


def _event(by: _Teller, first: int) -> tuple[str, str, int]:
    """A gain or a loss: as told, as calculated, and what there is then."""
    b = by.quantity()
    if b < first and by.chance.random() < 0.6:
        return by.say(LOSSES, b=b), f"{first} - {b} = {first - b}", first - b
    return by.say(GAINS, b=b), f"{first} + {b} = {first + b}", first + b


def _one_event(by: _Teller) -> Item:
    a = by.quantity()
    told, calculated, _ = _event(by, a)
    return by.item([by.say(HAS, a=a), told], LEFT, calculated)


def _two_events(by: _Teller) -> Item:
    a = by.quantity()
    first, calculated, now = _event(by, a)
    second, calculated_too, _ = _event(by, now)
    return by.item([by.say(HAS, a=a), first, second], LEFT, calculated, calculated_too)


def _times(by: _Teller) -> Item:
    a, k = by.quantity(LARGEST_FACTOR), by.chance.choice(MULTIPLIERS)
    return by.item([by.say(TIMES, a=a, k=k)], LEFT, f"{a} * {k} = {a * k}")


def _times_and_event(by: _Teller) -> Item:
    a, k = by.quantity(LARGEST_FACTOR), by.chance.choice(MULTIPLIERS)
    told, calculated, _ = _event(by, a * k)
    return by.item([by.say(TIMES, a=a, k=k), told], LEFT, f"{a} * {k} = {a * k}", calculated)


def _together(by: _Teller) -> Item:
    a, b = by.quantity(), by.quantity()
    told = [by.say(HAS[:2], a=a), "{y} has {b} {t}.".format(b=b, **by.words)]
    return by.item(told, TOGETHER, f"{a} + {b} = {a + b}")


def _compared(by: _Teller) -> Item:
    a, b = by.quantity(), by.quantity()
    if b < a and by.chance.random() < 0.6:
        return by.item([by.say(HAS[:2], a=a), by.say(FEWER, b=b)], HIS, f"{a} - {b} = {a - b}")
    return by.item([by.say(HAS[:2], a=a), by.say(MORE, b=b)], HIS, f"{a} + {b} = {a + b}")


def distinct(draw: Callable[[], Item], count: int) -> list[Item]:
    """`count` items of which no two ask the same."""
    found: dict[str, Item] = {}
    while len(found) < count:
        item = draw()
        found.setdefault(item.prompt, item)
    return list(found.values())
