"""Owns the text that the small OLMoE is pretrained on: WordNet's glosses and examples, what is a kind of what, small
stories, facts about numbers, lists said twice, and questions about what was just said.

Invariant: no document is one of the tasks. A story with numbers never says what they come to, a question for a number
that is not said names the operation, no gloss is followed by a choice of kinds, and no noun is told one of the kinds
that the multiple choice asks for.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.quality.kinds import KINDS
from benchmarks.quality.wordnet import Synset
from benchmarks.quality.words import (
    ADJECTIVES,
    COLOURS,
    DAYS,
    FRIENDS,
    HELD_NAMES,
    HELD_THINGS,
    NAMES,
    PLACES,
    THINGS,
    WEATHER,
)  # fmt: skip

PEOPLE = (*NAMES, *HELD_NAMES)
GOODS = (*THINGS, *HELD_THINGS)
MIXTURES: tuple[dict[str, float], ...] = (
    {"gloss": 0.28, "numbers": 0.30, "recall": 0.28, "story": 0.14},
    {"gloss": 0.22, "numbers": 0.26, "recall": 0.20, "story": 0.08, "lists": 0.24},
    {"gloss": 0.10, "numbers": 0.10, "recall": 0.20, "lists": 0.15, "copies": 0.45},
    {
        "gloss": 0.17, "numbers": 0.24, "recall": 0.14, "story": 0.05, "lists": 0.08, "copies": 0.07,
        "sums": 0.13, "quiz": 0.06, "above": 0.06,
    },
)  # fmt: skip
"""Shares of the documents, in one part of the pretraining after the other. A base of this size learns to say again what
was said only where it sees little else for a while."""
LARGEST_FIRST, LARGEST_SECOND = 60, 30
"""Of the operands of a fact."""


def documents(synsets: Sequence[Synset], seed: int, shares: Mapping[str, float]) -> Iterator[str]:
    """Without an end. Every synset comes up once before any comes up again."""
    chance = random.Random(seed)
    glosses = _glosses(synsets, chance)
    while True:
        (kind,) = chance.choices(list(shares), list(shares.values()))
        yield next(glosses) if kind == "gloss" else document(kind, synsets, chance)


def document(kind: str, synsets: Sequence[Synset], chance: random.Random) -> str:
    """One document of a kind."""
    if kind in OF_WORDNET:
        return OF_WORDNET[kind](synsets, chance)
    return MAKERS[kind](chance)


def _glosses(synsets: Sequence[Synset], chance: random.Random) -> Iterator[str]:
    while True:
        for one in chance.sample(synsets, len(synsets)):
            yield gloss(one, chance)


def gloss(synset: Synset, chance: random.Random) -> str:
    """A definition, with its examples."""
    word = chance.choice(synset.words)
    if synset.part == "noun":
        start = chance.choice(
            (f"{word}: {synset.gloss}.", f"{word} is {synset.gloss}.", f"{word} means {synset.gloss}.")
        )
    else:
        start = chance.choice((f"{word}: {synset.gloss}.", f"{word} means {synset.gloss}."))
    also = f" Another word for it is {chance.choice(synset.words)}." if len(synset.words) > 1 else ""
    return " ".join((start + also, *(f"{each[0].upper()}{each[1:]}." for each in synset.examples if each)))


def numbers(chance: random.Random) -> str:
    """Sums, differences and products, chains of them, counting, comparing."""
    kind = chance.random()
    if kind < 0.08:
        start, step = chance.randrange(60), chance.choice((1, 1, 2, 5, 10))
        return "Counting: " + ", ".join(str(start + step * at) for at in range(chance.randint(5, 8))) + "."
    if kind < 0.16:
        a, b = chance.randrange(LARGEST_FIRST), chance.randrange(LARGEST_FIRST)
        return f"{max(a, b)} is more than {min(a, b)}." if a != b else f"{a} is as many as {b}."
    facts: list[str] = []
    value = None
    for _ in range(chance.randint(1, 4)):
        fact, result = _fact(chance, value)
        facts.append(fact)
        value = result if result <= LARGEST_FIRST and chance.random() < 0.6 else None
    return ", ".join(facts)


def _fact(chance: random.Random, first: int | None) -> tuple[str, int]:
    sign = chance.choice("+++---*")
    if sign == "*":
        a, b = chance.randrange(2, 13), chance.randrange(2, 6)
        result = a * b
    else:
        a = chance.randint(1, LARGEST_FIRST) if first is None else first
        b = chance.randint(1, LARGEST_SECOND)
        sign = "+" if b > a else sign
        result = a + b if sign == "+" else a - b
    if chance.random() < 0.1:
        return f"{a} {({'+': 'plus', '-': 'minus', '*': 'times'})[sign]} {b} is {result}", result
    return f"{a} {sign} {b} = {result}", result


def story(chance: random.Random) -> str:
    """A few sentences about somebody and what they have."""
    name, other = chance.sample(PEOPLE, 2)
    thing, second = chance.sample(GOODS, 2)
    place, friend = chance.choice(PLACES), chance.choice(FRIENDS)
    n, m = chance.randint(2, LARGEST_SECOND), chance.randint(2, LARGEST_SECOND)
    sentences = (
        f"It was a {chance.choice(WEATHER)} {chance.choice(DAYS)}.",
        f"{name} went to the {place} with a {friend}.",
        f"{name} had {n} {thing}.",
        f"There were {m} {second} at the {place}.",
        f"{other} bought {m} {chance.choice(COLOURS)} {second}.",
        f"{name} gave {m} {thing} to {other}.",
        f"{other} found {n} {chance.choice(ADJECTIVES)} {thing} in the {place}.",
        f"{name} put {n} {thing} in each box.",
        f"{other} lost {m} {second} on {chance.choice(DAYS)}.",
        f"The {friend} liked the {chance.choice(ADJECTIVES)} {second}.",
        f"Each of the {thing} was {chance.choice(COLOURS)}.",
        f"{other} shared the {second} with {name}.",
        f"{name} sold some {thing} and kept the rest.",
        f"In the evening {name} and {other} walked home from the {place}.",
    )
    chosen = sorted(chance.sample(range(len(sentences)), chance.randint(3, 5)))
    return " ".join(sentences[at] for at in chosen)


def recall(chance: random.Random) -> str:
    """What several people have, and the same again: retold in another order, or asked for."""
    count = chance.randint(2, 3)
    people, things, places = (chance.sample(each, count) for each in (PEOPLE, GOODS, PLACES))
    counts = [chance.randint(2, LARGEST_SECOND) for _ in range(count)]
    way = chance.choice(("{p} has {n} {t}.", "{p} took {n} {t} to the {w}.", "There are {n} {t} in the {w}."))
    said = [
        way.format(p=p, n=n, t=t, w=w) for p, n, t, w in zip(people, counts, things, places, strict=True)
    ]  # fmt: skip
    if chance.random() < 0.5:
        return " ".join((*said, "So:", *chance.sample(said, count)))
    at = chance.randrange(count)
    asked = [
        (f"How many {things[at]} are mentioned?", f"{counts[at]}"),
        (f"What are there {counts[at]} of?", things[at]),
        ("Which numbers are mentioned?", ", ".join(map(str, counts))),
    ]
    if "{p}" in way:
        asked += [
            (f"Who has {things[at]}?", people[at]),
            (f"What does {people[at]} have?", f"{counts[at]} {things[at]}"),
        ]
    if "{w}" in way:
        asked.append((f"Where are the {things[at]}?", f"the {places[at]}"))
    question, answer = chance.choice(asked)
    return f"Question: {' '.join(said)} {question}\nAnswer: {answer}"


def lists(chance: random.Random) -> str:
    """A list said twice, or numbers and what they come to."""
    count = chance.randint(2, 4)
    if chance.random() < 0.5:
        people, things = chance.sample(PEOPLE, count), chance.sample(GOODS, count)
        listed = [f"{p} {chance.randint(2, LARGEST_SECOND)} {t}" for p, t in zip(people, things, strict=True)]
        again = listed if chance.random() < 0.5 else chance.sample(listed, count)
        return f"{', '.join(listed)}. {', '.join(again)}."
    said = [chance.randint(2, LARGEST_SECOND) for _ in range(count)]
    start = f"Numbers: {', '.join(map(str, said))}."
    if chance.random() < 0.4:
        return f"{start} Again: {', '.join(map(str, said))}."
    a, b = said[:2]
    facts = [f"{a} + {b} = {a + b}", f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}"]
    return f"{start} {chance.choice(facts)}"


def copies(chance: random.Random) -> str:
    """Words and numbers in no order, said twice."""
    pool = (*PEOPLE, *GOODS, *PLACES, *COLOURS, *map(str, range(2, LARGEST_FIRST)))
    said = " ".join(chance.sample(pool, chance.randint(5, 16)))
    return f"{said}. {said}."


def sums(chance: random.Random) -> str:
    """What several people have, and one calculation with it: which operation, and with what, is said."""
    count = chance.randint(2, 3)
    people, things = chance.sample(PEOPLE, count), chance.sample(GOODS, count)
    counts = [chance.randint(2, LARGEST_SECOND) for _ in range(count)]
    said = " ".join(f"{p} has {n} {t}." for p, n, t in zip(people, counts, things, strict=True))
    first, second = chance.sample(range(count), 2)
    (a, t), (b, u) = (counts[first], things[first]), (counts[second], things[second])
    ways = [(f"Add the {t} and the {u}.", f"{a} + {b} = {a + b}"), (f"Find {t} plus {u}.", f"{a} + {b} = {a + b}")]
    if a > b:
        asked = chance.choice((f"Subtract the {u} from the {t}.", f"Find {t} minus {u}."))
        ways += 2 * [(asked, f"{a} - {b} = {a - b}")]
    if a <= 12:
        k = chance.randrange(2, 6)
        ways += [(f"Multiply the {t} by {k}.", f"{a} * {k} = {a * k}")]
    told, answer = chance.choice(ways)
    return f"Question: {said} {told}\nAnswer: {answer}"


def quiz(synsets: Sequence[Synset], chance: random.Random) -> str:
    """Which of some words has a gloss, or which of some things was mentioned."""
    if chance.random() < 0.4:
        things = chance.sample(GOODS, 4)
        name, n, right = chance.choice(PEOPLE), chance.randint(2, LARGEST_SECOND), chance.choice(things)
        choices = f"{', '.join(things[:-1])} or {things[-1]}"
        return f"Question: {name} has {n} {right}. Which of {choices} does {name} have?\nAnswer: {right}"
    found = chance.sample(synsets, chance.randint(2, 4))
    words = [each.words[0] for each in found]
    right = chance.randrange(len(found))
    choices = f"{', '.join(words[:-1])} or {words[-1]}"
    asked = chance.choice((f"Which of {choices} means {found[right].gloss}?", f"{found[right].gloss}: {choices}?"))
    return f"Question: {asked}\nAnswer: {words[right]}"


def above(synsets: Sequence[Synset], chance: random.Random) -> str:
    """A few words and what each is a kind of. Raises ValueError if hardly any noun of these is a kind of anything."""
    said = list[str]()
    for _ in range(10_000):
        one = chance.choice(synsets)
        if one.part == "noun" and one.above and one.above not in KINDS.values():
            said.append(f"{one.words[0]} is a kind of {one.above}.")
        if len(said) == 4:
            return " ".join(said)
    raise ValueError("found hardly any noun that is a kind of another")


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "numbers": numbers, "recall": recall, "story": story, "lists": lists, "copies": copies,
    "sums": sums,
}  # fmt: skip
OF_WORDNET: dict[str, Callable[[Sequence[Synset], random.Random], str]] = {
    "gloss": lambda synsets, chance: gloss(chance.choice(synsets), chance), "quiz": quiz, "above": above,
}  # fmt: skip
