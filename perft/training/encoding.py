"""Owns how an example becomes tokens: by the model's chat template, or in the Alpaca prompt, as LLM-Adapters asks.

Invariant: prompt and answer are tokenised apart, as they are when a server tokenises the prompt and the model generates
the answer; and what is learned ends with the end-of-turn token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perft.errors import InputError
from perft.training.data import Example

IGNORED = -100
"""The label of a token that is not learned (transformers' and PyTorch's own)."""

Template = Literal["chat", "alpaca"]
LossOn = Literal["answer", "all"]
LongRows = Literal["error", "truncate", "skip"]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, and the label of each: its own id, or IGNORED."""

    ids: list[int]
    labels: list[int]


def template_of(tokenizer: Any, asked: str) -> Template:
    """The template that "auto" stands for. Raises InputError for "chat" where the tokenizer has none."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "auto":
        return "chat" if has_chat else "alpaca"
    if asked == "chat" and not has_chat:
        raise InputError("the tokenizer of the base has no chat template: use --template alpaca")
    return "alpaca" if asked == "alpaca" else "chat"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of Alpaca's data set, which LLM-Adapters took over."""
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    return template.format(instruction=instruction, context=context)


def encode_all(
    tokenizer: Any,
    examples: Sequence[Example],
    template: Template,
    loss_on: LossOn,
    max_length: int,
    long_rows: LongRows,
) -> list[Encoded]:  # fmt: skip
    """All examples as tokens. Raises InputError with every example that is too long, or that no template takes."""
    encoded: list[Encoded] = []
    problems: list[str] = []
    too_long = 0
    for example in examples:
        try:
            one = _encode(tokenizer, example, template, loss_on)
        except _TemplateError as error:
            problems.append(f"{example.where}: {error}")
            continue
        if len(one.ids) > max_length:
            too_long += 1
            if long_rows == "error":
                problems.append(f"{example.where}: found {len(one.ids)} tokens, expected at most {max_length}")
            if long_rows != "truncate":
                continue
            one = Encoded(one.ids[:max_length], one.labels[:max_length])
        if any(label != IGNORED for label in one.labels[1:]):
            encoded.append(one)
        else:
            problems.append(f"{example.where}: nothing of its answer is left within {max_length} tokens")
    if problems:
        hint = ": raise --max-length, or choose --long-rows truncate or skip" if too_long else ""
        raise InputError(f"{len(problems)} of {len(examples)} examples cannot be used{hint}", problems)
    if not encoded:
        raise InputError(f"all {len(examples)} examples are longer than {max_length} tokens: raise --max-length")
    return encoded


class _TemplateError(Exception):
    """The template does not take a conversation."""


def _encode(tokenizer: Any, example: Example, template: Template, loss_on: LossOn) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    parts = _chat(tokenizer, example) if template == "chat" else _alpaca(tokenizer, example)
    for tokens, is_answer in parts:
        ids += tokens
        labels += tokens if is_answer or loss_on == "all" else [IGNORED] * len(tokens)
    return Encoded(ids, labels)


def _chat(tokenizer: Any, example: Example) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each part of a conversation, and whether the assistant says it."""
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    done = ""
    for number, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        before = _rendered(tokenizer, messages[:number], add_generation_prompt=True)
        until = _rendered(tokenizer, messages[: number + 1], add_generation_prompt=False)
        if not (before.startswith(done) and until.startswith(before)):
            raise _TemplateError(
                "the base's chat template changes earlier turns of a conversation once there are later ones: give each "
                "answer a record of its own, or use --template alpaca"
            )
        yield tokenizer.encode(before[len(done) :], add_special_tokens=False), False
        answer = tokenizer.encode(until[len(before) :], add_special_tokens=False)
        ends = [place for place, token in enumerate(answer, start=1) if token == tokenizer.eos_token_id]
        yield answer[: ends[-1]] if ends else answer, True
        if ends and ends[-1] < len(answer):
            yield answer[ends[-1] :], False  # what the template adds after the end of a turn is not generated
        done = until


def _rendered(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False))
    except Exception as error:  # a template is a program of the model's authors, and raises what it likes
        raise _TemplateError(f"the base's chat template does not take it: {error}") from error


def _alpaca(tokenizer: Any, example: Example) -> Iterator[tuple[list[int], bool]]:
    if [turn.role for turn in example.turns] != ["user", "assistant"]:
        raise _TemplateError("the Alpaca prompt has one question and one answer: use a base with a chat template")
    instruction = example.instruction or example.turns[0].content
    yield tokenizer.encode(alpaca_prompt(instruction, example.context)), False
    yield [*tokenizer.encode(example.turns[1].content, add_special_tokens=False), tokenizer.eos_token_id], True
