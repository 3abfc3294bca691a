"""The tasks' parts are apart: what a test item says, no training item has said."""

import random
import re

import pytest

from benchmarks.quality import data, text, wordnet
from benchmarks.quality.check import SYNSETS
from benchmarks.quality.kinds import KINDS, Nouns
from benchmarks.quality.problems import GOODS, PARTS, PEOPLE, QUANTITIES, Item
from benchmarks.quality.words import NAMES, PLACES, THINGS

PAIRS = (("train", "tune"), ("train", "test"), ("tune", "test"))
COUNT = 400


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Item]]:
    return {part: data.items("arithmetic", part, COUNT) for part in PARTS}


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Item]]:
    synsets = wordnet.synsets(SYNSETS)
    return {part: data.items("kinds", part, 60, synsets) for part in PARTS}


def words_of(items: list[Item]) -> set[str]:
    return {word for item in items for word in re.findall(r"[A-Za-z]+|\d+", item.prompt)}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_parts_of_the_problems_share_no_name_no_thing_and_no_quantity(
    problems: dict[str, list[Item]], one: str, other: str
) -> None:
    shared = words_of(problems[one]) & words_of(problems[other])
    everybody = {name for part in PARTS for name in PEOPLE[part]}
    things = {thing for part in PARTS for thing in GOODS[part]}
    assert not shared & everybody and not shared & things
    assert {number for number in shared if number.isdigit()} <= {"2", "3", "4", "5"}, "only multipliers are shared"
    assert not {item.prompt for item in problems[one]} & {item.prompt for item in problems[other]}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_words_and_quantities_that_parts_draw_from_are_apart(one: str, other: str) -> None:
    for drawn in (PEOPLE, GOODS, QUANTITIES):
        assert drawn[one] and not set(drawn[one]) & set(drawn[other])


def test_every_problem_is_answered_rightly(problems: dict[str, list[Item]]) -> None:
    """Each step's result is right, the next one goes on from it, and each quantity of it was said."""
    operations = set()
    for item in (each for part in PARTS for each in problems[part]):
        said, before = {int(n) for n in re.findall(r"\d+", item.prompt)}, None
        for step in item.completion.split(", "):
            a, sign, b, result = re.fullmatch(r"(\d+) ([+*-]) (\d+) = (\d+)", step).groups()
            operations.add(sign)
            assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert int(a) == before if before is not None else int(a) in said
            assert int(b) in said
            before = int(result)
    assert operations == {"+", "-", "*"}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_parts_of_the_multiple_choice_share_no_noun_and_no_gloss(one: str, other: str) -> None:
    by_part = Nouns(wordnet.synsets(SYNSETS)).by_part
    pairs = {part: {pair for pairs in by_part[part].values() for pair in pairs} for part in (one, other)}
    for place in (0, 1):
        mine, theirs = ({pair[place].lower() for pair in pairs[part]} for part in (one, other))
        assert mine and theirs and not mine & theirs


def test_a_gloss_that_two_nouns_have_is_asked_for_neither() -> None:
    synsets = wordnet.synsets(SYNSETS)
    doubled = "a turn made in skiing"
    assert sum(each.gloss == doubled for each in synsets) == 2
    by_part = Nouns(synsets).by_part
    glosses = {gloss for kinds in by_part.values() for pairs in kinds.values() for _, gloss in pairs}
    assert len(glosses) > 150 and doubled not in glosses


def test_the_right_choice_is_one_of_four_in_any_place(questions: dict[str, list[Item]]) -> None:
    one, places = f"({'|'.join(KINDS.values())})", set()
    for item in (each for part in PARTS for each in questions[part]):
        listed = re.search(rf"\b{one}, {one}, {one} or {one}\b", item.prompt)
        assert listed is not None, item.prompt
        shown = listed.groups()
        places.add(shown.index(item.completion))
        assert len(set(shown)) == 4
    assert places == {0, 1, 2, 3}


def test_the_same_items_come_again() -> None:
    assert data.items("arithmetic", "test", 20) == data.items("arithmetic", "test", 20)
    assert data.items("arithmetic", "test", 20) == data.items("arithmetic", "test", 30)[:20]
    random.seed(0)
    assert data.items("arithmetic", "train", 5) != data.items("arithmetic", "tune", 5)


def test_words_for_several_uses_are_not_mixed_up() -> None:
    assert not set(NAMES) & set(PLACES) and not set(THINGS) & set(PLACES)


def test_no_noun_is_told_one_of_the_kinds_in_the_pretraining() -> None:
    synsets, chance = wordnet.synsets(SYNSETS), random.Random(1)
    told = [each for _ in range(300) for each in text.document("above", synsets, chance).split(". ")]
    kinds = {each.rstrip(".").partition(" is a kind of ")[2] for each in told}
    assert len(kinds) > 3 and not kinds & set(KINDS.values())
    assert {each.above for each in synsets} & set(KINDS.values()), "there are some that could have been told"


def test_a_calculation_of_the_pretraining_is_one_that_the_question_names() -> None:
    chance = random.Random(1)
    names = {"+": r"Add the|plus", "-": r"Subtract the|minus", "*": r"Multiply the"}
    signs = set()
    for _ in range(300):
        question, answer = text.sums(chance).split("\nAnswer: ")
        a, sign, b, result = re.fullmatch(r"(\d+) ([+*-]) (\d+) = (\d+)", answer).groups()
        assert re.search(names[sign], question) and {a, b} <= set(re.findall(r"\d+", question))
        assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert not re.search(r"How many|What is the number", question), "as the task asks"
        signs.add(sign)
    assert signs == {"+", "-", "*"}


def test_a_quiz_of_the_pretraining_asks_for_one_of_its_choices_and_for_no_kind() -> None:
    synsets, chance = wordnet.synsets(SYNSETS), random.Random(1)
    for _ in range(200):
        question, answer = text.quiz(synsets, chance).split("\nAnswer: ")
        assert answer in question and "What kind" not in question
