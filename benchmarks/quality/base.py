"""Owns the small OLMoE: its shape, its tokenizer, its seeded pretraining, and the checkpoint that all runs start from.

Invariant: the same seed gives the same text, the same initial weights and the same order; a pretraining that was
killed goes on from its last checkpoint (kept every minute) as if it had not been.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.text import MIXTURES, documents
from benchmarks.quality.wordnet import Synset

SPECIAL = ("<pad>", "<eos>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Answer: ' + message['content'] + '<eos>' }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
SAVE_EVERY = 60.0
"""Seconds."""


@dataclass(frozen=True)
class Recipe:
    """The shape of the base and how long it is trained; each step sees `batch` rows of `length` tokens.

    mixtures_until: the step before which each mixture of text but the last ends. pieces: of each mixture, drawn at
    once, each with a seed of its own. decay: steps at the end over which the learning rate falls to 0.
    """

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    expert_width: int = 192
    steps: int = 16_000
    mixtures_until: tuple[int, ...] = (2_000, 4_000, 6_500)
    pieces: int = 1
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    warm_up: int = 100
    decay: int = 5_000
    weight_decay: float = 0.05
    aux_loss: float = 0.01
    computed: str = "grouped_mm"
    """transformers' `experts_implementation`."""
    seed: int = 1


def make_tokenizer(synsets: list[Synset], recipe: Recipe, sample: int = 60_000) -> Any:
    """Bytes' pairs from the text itself, in which a number below a hundred becomes one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(islice(documents(synsets, recipe.seed, MIXTURES[0]), sample), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(recipe: Recipe, tokenizer: Any) -> Any:
    """With random weights."""
    torch.manual_seed(recipe.seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.expert_width,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
            num_experts=recipe.experts, num_experts_per_tok=recipe.top_k, max_position_embeddings=256,
            tie_word_embeddings=True, router_aux_loss_coef=recipe.aux_loss,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            experts_implementation=recipe.computed,
        )
    )  # fmt: skip


def token_stream(source: Iterator[str], tokenizer: Any, count: int) -> torch.Tensor:
    """`count` tokens of documents, an end-of-text token after each."""
    ids: list[int] = []
    while len(ids) < count:
        for one in tokenizer(list(islice(source, 2000))).input_ids:
            ids += one
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids[:count], dtype=torch.int32)


def pretrain(
    synsets: list[Synset], recipe: Recipe, folder: Path, work: Path, until: int | None = None, device: str = "cpu"
) -> dict[str, Any] | None:  # fmt: skip
    """Write the base into `folder`, in bfloat16, with pretraining.json, which is returned. work: its checkpoints.

    until: stop before this step, as a kill would, with nothing in `folder`; None is returned. Raises ValueError if
    `work` is of another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _once(work / "tokenizer", lambda: make_tokenizer(synsets, recipe))
    tokens = _stream(work / "tokens.pt", synsets, tokenizer, recipe)
    model = make_model(recipe, tokenizer).to(device)
    decayed = [each for each in model.parameters() if each.ndim > 1]
    plain = [each for each in model.parameters() if each.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    state = work / "state.pt"
    first, seconds, history = 0, 0.0, []
    if state.is_file():
        kept = torch.load(state, map_location=device)
        if kept.get("recipe", asdict(recipe)) != asdict(recipe):
            raise ValueError(f"found another recipe's pretraining in {work}: remove it to begin anew")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first, seconds, history = kept["step"], kept["seconds"], kept["history"]
    last = recipe.steps if until is None else until
    a_step = recipe.batch * recipe.length
    started = saved = time.monotonic()
    model.train()
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        rows = tokens[step * a_step :][:a_step].view(recipe.batch, -1).to(device).long()
        output = model(rows, labels=rows, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            loss = output.loss.item() - recipe.aux_loss * output.aux_loss.item()
            history.append([step + 1, round(loss, 4), round(output.aux_loss.item(), 4)])
            print(f"step {step + 1}/{recipe.steps}: loss {loss:.3f}, balance {output.aux_loss.item():.3f}", flush=True)
        now = time.monotonic()
        if now - saved > SAVE_EVERY or step + 1 == last:
            saved = now
            kept = {
                "recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step + 1, "seconds": seconds + now - started, "history": history,
            }  # fmt: skip
            torch.save(kept, state.with_suffix(".new"))
            os.replace(state.with_suffix(".new"), state)
    if last < recipe.steps:
        return None
    told = {
        "recipe": asdict(recipe), "parameters": sum(each.numel() for each in model.parameters()),
        "tokens": recipe.steps * recipe.batch * recipe.length,
        "seconds": round(seconds + time.monotonic() - started), "history": history,
    }  # fmt: skip
    model.to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    return told


def _schedule(step: int, recipe: Recipe) -> float:
    """Up in a line, level, and down in a line over the last `decay` steps."""
    return min(1.0, (step + 1) / recipe.warm_up, (recipe.steps - step) / recipe.decay)


def _once(folder: Path, make: Any) -> Any:
    if not (folder / "tokenizer.json").is_file():
        make().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _stream(file: Path, synsets: list[Synset], tokenizer: Any, recipe: Recipe) -> torch.Tensor:
    """The tokens of the whole pretraining. Of a mixture drawn in one piece a longer stream begins with the shorter."""
    a_step = recipe.batch * recipe.length
    found: torch.Tensor | None = torch.load(file) if file.is_file() else None
    if found is None or len(found) < recipe.steps * a_step:
        ends = [min(end, recipe.steps) for end in (*recipe.mixtures_until, recipe.steps)]
        pieces = [
            _Piece(recipe.seed + part + len(MIXTURES) * number, part, -(-(end - start) * a_step // recipe.pieces))
            for part, (start, end) in enumerate(pairwise((0, *ends)))
            for number in range(recipe.pieces)
        ]
        draw = partial(_drawn, synsets=synsets, tokenizer=tokenizer)
        if recipe.pieces == 1:
            found = torch.cat(list(map(draw, pieces)))
        else:
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
                found = torch.cat(list(pool.map(draw, pieces)))
        torch.save(found, file)
    return found


class _Piece(NamedTuple):
    """A stretch of one mixture of text."""

    seed: int
    mixture: int
    tokens: int


def _drawn(piece: _Piece, synsets: list[Synset], tokenizer: Any) -> torch.Tensor:
    return token_stream(documents(synsets, piece.seed, MIXTURES[piece.mixture]), tokenizer, piece.tokens)
