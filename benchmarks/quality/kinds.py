"""Owns the multiple choice: a noun of WordNet and its gloss, and four kinds of which it is one.

Invariant: the parts (train, tune, test) share no noun and no gloss. A noun's part depends on the noun alone, and a
gloss that several nouns have is in none.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from zlib import crc32

from benchmarks.quality.problems import Item
from benchmarks.quality.wordnet import Synset

KINDS = {
    4: "act", 5: "animal", 6: "object", 7: "quality", 8: "body part", 9: "idea", 10: "message", 11: "event",
    12: "feeling", 13: "food", 14: "group", 15: "place", 18: "person", 20: "plant", 21: "possession", 23: "amount",
    26: "state", 27: "substance", 28: "time",
}  # fmt: skip
"""The lexicographer's files, and what a question calls them."""
CHOICES = 4
WAYS = (
    "{noun} is {gloss}. What kind of thing is {noun}: {choices}?",
    "Which of {choices} is {noun}? It means {gloss}.",
    "{noun}: {gloss}. Choose one of {choices}.",
)
LONGEST_GLOSS = 80


def part_of_noun(noun: str) -> str:
    """The one part whose questions ask for this noun."""
    return {0: "test", 1: "test", 2: "tune"}.get(crc32(noun.lower().encode()) % 10, "train")


class Nouns:
    """by_part: part -> kind -> nouns with their glosses."""

    def __init__(self, synsets: Sequence[Synset]) -> None:
        usable = [each for each in synsets if each.part == "noun" and each.lexfile in KINDS]
        often = Counter(each.gloss for each in usable)
        self.by_part: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for each in usable:
            noun = each.words[0]
            if often[each.gloss] == 1 and len(each.gloss) <= LONGEST_GLOSS:
                self.by_part[part_of_noun(noun)][KINDS[each.lexfile]].append((noun, each.gloss))

    def question(self, part: str, chance: random.Random) -> Item:
        """One question of a part; all kinds are equally likely."""
        by_kind = self.by_part[part]
        kind = chance.choice(sorted(by_kind))
        noun, gloss = chance.choice(by_kind[kind])
        choices = [kind, *chance.sample([each for each in KINDS.values() if each != kind], CHOICES - 1)]
        shown = chance.sample(choices, CHOICES)
        listed = f"{', '.join(shown[:-1])} or {shown[-1]}"
        return Item(chance.choice(WAYS).format(noun=noun, gloss=gloss, choices=listed), kind)
