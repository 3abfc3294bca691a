"""Owns the text that the small OLMoE is pretrained on: WordNet's glosses and examples, small stories, facts about
numbers, and questions about what was just said.

Invariant: no document is one of the tasks. A story with numbers never says what they come to, no question asks for a
number that is not said, and no gloss is followed by a choice of kinds.
"""

import random
from collections.abc import Iterator, Sequence

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
SHARES = {"gloss": 0.38, "numbers": 0.30, "recall": 0.20, "story": 0.12}
"""Of the documents, which are about equally long."""


def documents(synsets: Sequence[Synset], seed: int) -> Iterator[str]:
    """Without an end. Every synset comes up once before any comes up again."""
    chance = random.Random(seed)
    glosses = _glosses(synsets, chance)
    makers = {"numbers": numbers, "recall": recall, "story": story}
    while True:
        (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
        yield next(glosses) if kind == "gloss" else makers[kind](chance)


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
    if kind < 0.15:
        start, step = chance.randrange(90), chance.choice((1, 1, 2, 5, 10))
        return "Counting: " + ", ".join(str(start + step * at) for at in range(chance.randint(5, 10))) + "."
    if kind < 0.25:
        a, b = chance.randrange(150), chance.randrange(150)
        return f"{max(a, b)} is more than {min(a, b)}." if a != b else f"{a} is as many as {b}."
    facts = []
    value = None
    for _ in range(chance.randint(1, 4)):
        fact, result = _fact(chance, value)
        facts.append(fact)
        value = result if chance.random() < 0.6 else None
    return ", ".join(facts) + chance.choice((".", ""))


def _fact(chance: random.Random, first: int | None) -> tuple[str, int]:
    sign = chance.choice("++--*/")
    if sign in "+-":
        a = chance.randrange(1, 100) if first is None else first
        b = chance.randrange(1, 100 if sign == "+" else max(2, a + 1))
        if sign == "-" and b > a:
            sign = "+"
        result = a + b if sign == "+" else a - b
    elif sign == "*" or first is not None:
        a, b = (chance.randrange(2, 13) if first is None or first > 20 else max(1, first)), chance.randrange(2, 10)
        sign, result = "*", a * b
    else:
        result, b = chance.randrange(2, 13), chance.randrange(2, 10)
        a = result * b
    words = {"+": ("plus",), "-": ("minus",), "*": ("times",), "/": ("divided by",)}[sign]
    if chance.random() < 0.2:
        return f"{a} {chance.choice(words)} {b} is {result}", result
    return f"{a} {sign} {b} = {result}", result


def story(chance: random.Random) -> str:
    """A few sentences about somebody and what they have."""
    name, other = chance.sample(PEOPLE, 2)
    thing, second = chance.sample(GOODS, 2)
    place, friend = chance.choice(PLACES), chance.choice(FRIENDS)
    n, m = chance.randrange(2, 100), chance.randrange(2, 100)
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
    """What several people have, and questions that the sentences before them answer."""
    people, things = chance.sample(PEOPLE, 3), chance.sample(GOODS, 3)
    counts, places = [chance.randrange(1, 100) for _ in range(3)], chance.sample(PLACES, 3)
    said = chance.choice(
        (
            [f"{p} has {n} {t}." for p, n, t in zip(people, counts, things, strict=True)],
            [f"{p} took {n} {t} to the {w}." for p, n, t, w in zip(people, counts, things, places, strict=True)],
            [f"There are {n} {t} in the {w}." for n, t, w in zip(counts, things, places, strict=True)],
        )
    )
    at = chance.randrange(3)
    has_people, has_places = people[0] in said[0], places[0] in said[0]
    asked = [(f"How many {things[at]} are mentioned?", f"{counts[at]}")]
    asked.append((f"What are there {counts[at]} of?", things[at]))
    asked.append(("Which numbers are mentioned?", ", ".join(map(str, counts))))
    if has_people:
        asked.append((f"Who has {things[at]}?", people[at]))
        asked.append((f"What does {people[at]} have?", f"{counts[at]} {things[at]}"))
    if has_places:
        asked.append((f"Where are the {things[at]}?", f"the {places[at]}"))
    lines = [f"Question: {' '.join(said)} {q}\nAnswer: {a}" for q, a in chance.sample(asked, 1)]
    return "\n".join(lines)
