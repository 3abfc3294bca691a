"""Owns how the demo base is prompted in training, with Hugging Face: its chat template, and greedy answers."""

from typing import Any, NamedTuple

import torch


class Example(NamedTuple):
    """One exchange to learn: the user's message and the answer the assistant should give."""

    prompt: str
    answer: str


class Encoded(NamedTuple):
    """An example as tokens: from `answer_start` on, the answer and its end-of-turn token."""

    ids: list[int]
    answer_start: int


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a chat of one message, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode(tokenizer: Any, example: Example) -> Encoded:
    """The tokens of a whole exchange."""
    prompt = prompt_ids(tokenizer, example.prompt)
    answer = tokenizer.encode(example.answer, add_special_tokens=False)
    return Encoded([*prompt, *answer, tokenizer.eos_token_id], len(prompt))


def answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int = 100) -> list[str]:
    """The model's greedy answer to each prompt."""
    given: list[str] = []
    for start in range(0, len(prompts), batch_size):
        encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        ids, mask = left_padded(encoded, tokenizer.pad_token_id)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
        given += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in given]


def left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest] with `pad` on the left, and their attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
