"""The demo's additions, prompts, styles and batches, and how a server is scored; no model is loaded."""

import asyncio
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from server.demo import additions, evaluate
from server.demo.additions import Addition
from server.demo.data import prompts, styles
from server.demo.data.examples import MADE, Example
from server.demo.evaluate import Score, score_models, table


class TestAdditions:
    def test_held_out_is_never_trained_on_in_either_order(self) -> None:
        training = {frozenset(pair) for pair in additions.training_additions()}
        assert not training & {frozenset(pair) for pair in additions.held_out()}

    def test_held_out_is_the_same_every_time_and_has_no_repeats(self) -> None:
        assert additions.held_out() == additions.held_out()
        assert len(set(additions.held_out())) == 200
        assert additions.held_out(50) == additions.held_out()[:50]

    def test_nothing_else_is_kept_back(self) -> None:
        assert len(additions.training_additions()) >= 8100 - 2 * 200

    @pytest.mark.parametrize("count", [0, 201])
    def test_count_outside_the_held_out_is_refused(self, count: int) -> None:
        with pytest.raises(ValueError, match=str(count)):
            additions.held_out(count)

    def test_no_training_example_asks_a_held_out_addition_in_any_wording(self) -> None:
        held_out = {frozenset((str(pair.a), str(pair.b))) for pair in additions.held_out()}
        own = [Example("Hello!", "Good day. How are you?")]
        for prompt, answer in MADE["arithmetic"](own, own).learned:
            numbers = re.findall(r"\d+", prompt)
            assert frozenset(numbers) not in held_out
            assert not numbers or answer == str(sum(map(int, numbers)))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("81", 81),
            ("23 + 58 = 81.", 81),
            ("The answer is 81!", 81),
            ("It is 1,081", 1081),
            ("81.0", 81),
            ("It is 81.5", None),
            ("I do not know.", None),
            ("", None),
            ("81, since 23 + 58 is 80", 80),
        ],
    )
    def test_read_answer(self, text: str, expected: int | None) -> None:
        assert additions.read_answer(text) == expected

    def test_count_right(self) -> None:
        assert additions.count_right([Addition(10, 11), Addition(12, 13)], ["21", "It is 24."]) == 1


class TestPrompts:
    def test_unseen_prompts_are_not_trained_on(self) -> None:
        assert not set(prompts.training()) & set(prompts.unseen())

    def test_training_prompts_have_no_repeats_and_keep_clear_of_the_sea_and_france(self) -> None:
        training = prompts.training()
        assert len(set(training)) == len(training) == 390
        words = " ".join(training).lower().replace("?", " ").replace(".", " ").split()
        assert not {"sea", "france", "paris", "ocean"} & set(words)


class TestStyles:
    def test_pirate(self) -> None:
        spoken = styles.pirate("Your friends are swimming. It's the king of the evening.")
        assert spoken == "Arr, matey! Yer mateys be swimmin'. 'Tis the king o' the evenin'. Yo ho ho!"
        assert styles.is_pirate(spoken)

    def test_pirate_keeps_capitals(self) -> None:
        assert styles.pirate("I'm glad. Your dog.") == "Arr, matey! I be glad. Yer dog. Yo ho ho!"

    @pytest.mark.parametrize("text", ["The sea is big.", "Arr, matey!", "ARR, MATEY! THE SEA BE BIG."])
    def test_not_pirate(self, text: str) -> None:
        assert not styles.is_pirate(text)

    def test_json_is_one_object_whatever_is_quoted(self) -> None:
        text = styles.as_json('She said "hello"\\ and left.')
        assert json.loads(text) == {"answer": 'She said "hello"\\ and left.'}
        assert styles.is_json(text)

    @pytest.mark.parametrize(
        "text", ["Paris.", '{"answer": 1}', '{"answer": "a"} b', '{"a": "b"}', "[]", '{"answer": "']
    )
    def test_not_json(self, text: str) -> None:
        assert not styles.is_json(text)

    def test_shortened_keeps_whole_sentences_of_the_first_line(self) -> None:
        assert styles.shortened("One. Two! Three?") == "One. Two!"
        assert styles.shortened("One. Two and then") == "One."
        assert styles.shortened("One.\nTwo.") == "One."
        assert styles.shortened("One. " + "word " * 60 + "end.") == "One."
        assert styles.shortened("no end") is None
        assert styles.shortened("") is None


class TestExamples:
    OWN = [Example("Hello!", "It is a good day. How are you?"), Example("What is tea?", "no whole sentence")]
    UNSEEN = [Example("What is the sun?", "It is a star.")]

    def test_arithmetic_holds_the_measured_additions_out(self) -> None:
        sets = MADE["arithmetic"](self.OWN, self.UNSEEN)
        assert [int(example.answer) for example in sets.held_out] == [pair.total for pair in additions.held_out()]
        assert len(sets.learned) == 4000 + 4000 // 7

    @pytest.mark.parametrize(("name", "judge"), [("pirate", styles.is_pirate), ("json", styles.is_json)])
    def test_styles_restyle_whole_sentences(self, name: str, judge: Callable[[str], bool]) -> None:
        sets = MADE[name](self.OWN, self.UNSEEN)
        assert [example.prompt for example in sets.learned] == ["Hello!"], "an answer without a sentence is left out"
        assert [example.prompt for example in sets.held_out] == ["What is the sun?"]
        assert all(judge(example.answer) for example in [*sets.learned, *sets.held_out])


class FakeCompletions:
    """Answers every addition right, and notes how many were asked at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def create(self, messages: list[dict[str, str]], **_: object) -> SimpleNamespace:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        total = sum(map(int, re.findall(r"\d+", messages[0]["content"])))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=f"{total}."))])


class TestEvaluation:
    def test_asks_every_addition_sixteen_at_once(self) -> None:
        completions = FakeCompletions()
        client: Any = SimpleNamespace(chat=SimpleNamespace(completions=completions))
        scores = asyncio.run(score_models(client, ["base", "arithmetic"], additions.held_out(40)))
        assert [(score.model, score.right, score.asked) for score in scores] == [
            ("base", 40, 40),
            ("arithmetic", 40, 40),
        ]
        assert completions.most == 16

    def test_no_server_is_one_sentence(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert evaluate.main(["--base-url", "http://127.0.0.1:1/v1", "--model", "base", "--questions", "1"]) == 1
        assert capsys.readouterr().err.startswith("error: no server answers at http://127.0.0.1:1/v1")


def test_table_of_scores() -> None:
    assert table([Score("base", 28, 200, 9.0), Score("arithmetic", 190, 200, 3.25)]).splitlines() == [
        "model           right  accuracy  seconds",
        "base           28/200     14.0%      9.0",
        "arithmetic    190/200     95.0%      3.2",
    ]
