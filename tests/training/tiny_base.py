"""A tiny random base with a tokenizer of characters and a chat template, and data that it can learn in seconds."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny

SPECIAL = ("<pad>", "<s>", "<|im_end|>", "<|im_start|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token for each printable ASCII character, a line break, and the special tokens."""
    characters = [*SPECIAL, "\n", *(chr(code) for code in range(32, 127))]
    made = Tokenizer(models.WordLevel({text: number for number, text in enumerate(characters)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast


def build(kind: str, folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A checkpoint with its tokenizer."""
    tiny.build(kind, folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def additions(count: int) -> list[dict[str, str]]:
    """Sums of one digit each, in LLM-Adapters' format."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return [{"instruction": f"{a}+{b}", "output": str(a + b)} for a, b in (pairs * (1 + count // 100))[:count]]


def write_lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file
