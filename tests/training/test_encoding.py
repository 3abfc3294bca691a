"""Examples as tokens: the chat template's text, what is learned of it, and what no template takes."""

from pathlib import Path
from typing import Any

import pytest

from perft.errors import InputError
from perft.training.data import Example, Turn
from perft.training.encoding import IGNORED, alpaca_prompt, encode_all, template_of
from tests.training import tiny_base

FORGETFUL = (
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(*turns: tuple[str, str]) -> Example:
    return Example("here", tuple(Turn(*turn) for turn in turns))


def encoded(example: Example, tokenizer: Any = None, **changes: Any) -> Any:
    values = {"template": "chat", "loss_on": "answer", "max_length": 256, "long_rows": "error"} | changes
    return encode_all(tokenizer or tiny_base.tokenizer(), [example], **values)[0]


def learned(tokenizer: Any, one: Any) -> str:
    return str(tokenizer.decode([label for label in one.labels if label != IGNORED]))


def test_the_tokens_are_those_of_the_whole_text() -> None:
    tokenizer = tiny_base.tokenizer()
    turns = [("system", "Be short."), ("user", "2+2"), ("assistant", "4"), ("user", "3+3"), ("assistant", "6")]
    one = encoded(conversation(*turns), tokenizer)
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert one.ids == tokenizer.encode(text, add_special_tokens=False)
    assert learned(tokenizer, one) == "4<|im_end|>6<|im_end|>"


def test_the_prompt_is_what_a_server_makes_of_it() -> None:
    tokenizer = tiny_base.tokenizer()
    one = encoded(conversation(("user", "2+2"), ("assistant", "4")), tokenizer)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "2+2"}], add_generation_prompt=True)["input_ids"]
    assert one.ids[: len(asked)] == asked
    assert set(one.labels[: len(asked)]) == {IGNORED}


def test_all_tokens_can_be_learned() -> None:
    one = encoded(conversation(("user", "2+2"), ("assistant", "4")), loss_on="all")
    assert [label for label in one.labels if label != IGNORED][:3] == one.ids[:3]


def test_the_alpaca_prompt() -> None:
    tokenizer = tiny_base.tokenizer(None)
    example = Example("here", (Turn("user", "add\n\n2 2"), Turn("assistant", "4")), "add", "2 2")
    one = encoded(example, tokenizer, template="alpaca")
    text = alpaca_prompt("add", "2 2")
    assert "### Input:\n2 2\n\n### Response:\n" in text and "further context" in text
    assert tokenizer.decode(one.ids) == f"{text}4<|im_end|>"
    assert learned(tokenizer, one) == "4<|im_end|>"
    assert "### Input" not in alpaca_prompt("add")


def test_which_template() -> None:
    with_chat, without = tiny_base.tokenizer(), tiny_base.tokenizer(None)
    assert (template_of(with_chat, "auto"), template_of(without, "auto")) == ("chat", "alpaca")
    assert template_of(with_chat, "alpaca") == "alpaca"
    with pytest.raises(InputError, match="--template alpaca"):
        template_of(without, "chat")


def test_long_rows() -> None:
    long = conversation(("user", "2+2"), ("assistant", "4" * 300))
    with pytest.raises(InputError, match=r"raise --max-length[^$]*here: found 3\d\d tokens, expected at most 256"):
        encoded(long)
    cut = encoded(long, long_rows="truncate")
    assert len(cut.ids) == len(cut.labels) == 256
    with pytest.raises(InputError, match="all 1 examples are longer"):
        encoded(long, long_rows="skip")


def test_a_row_whose_answer_is_cut_away() -> None:
    with pytest.raises(InputError, match="nothing of its answer is left"):
        encoded(conversation(("user", "2" * 300), ("assistant", "4")), long_rows="truncate")


def test_a_template_that_changes_earlier_turns() -> None:
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    with pytest.raises(InputError, match="changes earlier turns"):
        encoded(conversation(*turns), tiny_base.tokenizer(FORGETFUL))


def test_a_template_that_raises() -> None:
    raising = tiny_base.tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="does not take it: no system role"):
        encoded(conversation(("user", "1"), ("assistant", "2")), raising)


def test_the_alpaca_prompt_has_one_question(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one question and one answer"):
        encoded(conversation(("system", "a"), ("user", "1"), ("assistant", "2")), template="alpaca")
