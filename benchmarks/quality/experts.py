"""Owns how far the base's experts differ: their use, the entropy of it, what it tells of the kind of text, how alike
their outputs are, and what the loss becomes where experts change places."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality import text
from benchmarks.quality.wordnet import Synset
from perft.hf import MoeBlock, moe_blocks
from perft.inspection.routing import mutual_information

SEED = 12345
"""Of texts that the base was not pretrained on (glosses excepted: there is one WordNet)."""
DOCUMENTS = 150
"""Of each kind."""
SAMPLE = 400
"""Tokens whose outputs of all experts are compared."""


@torch.no_grad()
def measured(model: Any, tokenizer: Any, synsets: Sequence[Synset], documents: int = DOCUMENTS) -> dict[str, Any]:
    """All of it, by layer where it is of a layer."""
    chance = random.Random(SEED)
    texts = {kind: [text.document(kind, synsets, chance) for _ in range(documents)] for kind in text.MIXTURES[-1]}
    blocks = moe_blocks(model)
    seen = _Seen(blocks)
    losses = {kind: _loss(model, tokenizer, each, seen, kind) for kind, each in texts.items()}
    layers = [_layer(block, seen, index) for index, block in blocks.items()]
    seen.stop()
    moved = _with_moved_experts(blocks, lambda: {k: _loss(model, tokenizer, each) for k, each in texts.items()})
    return {
        "seed": SEED, "documents_of_each_kind": documents, "loss": losses, "loss_with_moved_experts": moved,
        "layers": layers,
    }  # fmt: skip


class _Seen:
    """What every block's experts were called with: inputs, choices, and the kind of text."""

    def __init__(self, blocks: dict[int, MoeBlock]) -> None:
        self.kind = ""
        self.calls: dict[int, list[tuple[str, torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._handles = [
            block.experts.register_forward_pre_hook(
                lambda module, inputs, index=index: self.calls[index].append((self.kind, inputs[0], inputs[1]))
            )
            for index, block in blocks.items()
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


def _loss(model: Any, tokenizer: Any, texts: Sequence[str], seen: _Seen | None = None, kind: str = "") -> float:
    """Mean cross-entropy of a token."""
    if seen is not None:
        seen.kind = kind
    total, count = 0.0, 0
    for each in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(each).input_ids]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return round(total / count, 4)


def _layer(block: MoeBlock, seen: _Seen, index: int) -> dict[str, Any]:
    calls = seen.calls[index]
    experts = len(block.router_weight)
    chosen_TJ = torch.cat([chosen for _, _, chosen in calls])
    kinds = list(text.MIXTURES[-1])
    kind_T = torch.cat([torch.full((len(chosen),), kinds.index(kind)) for kind, _, chosen in calls])
    use_N = chosen_TJ.flatten().bincount(minlength=experts) / chosen_TJ.numel()
    x_SD = torch.cat([x.flatten(0, -2) for _, x, _ in calls])
    x_SD = x_SD[torch.randperm(len(x_SD), generator=torch.Generator().manual_seed(SEED))[:SAMPLE]]
    return {
        "use": [round(each, 4) for each in use_N.tolist()],
        "entropy": round(-sum(p * math.log(p) for p in use_N.tolist() if p) / math.log(experts), 4),
        "kind_told_by_first_expert": round(mutual_information(chosen_TJ[:, 0], kind_T), 4),
        "similarity": round(_similarity(block, x_SD, experts), 4),
        "most_used_by_kind": {
            kind: round(_largest_share(chosen_TJ[kind_T == number], experts), 4) for number, kind in enumerate(kinds)
        },
    }  # fmt: skip


def _largest_share(chosen_TJ: torch.Tensor, experts: int) -> float:
    return float((chosen_TJ.flatten().bincount(minlength=experts) / len(chosen_TJ)).max())


def _similarity(block: MoeBlock, x_SD: torch.Tensor, experts: int) -> float:
    """Mean cosine of two different experts' outputs for the same token; 1: all experts are equal."""
    ones_S1 = torch.ones(len(x_SD), 1)
    outputs_NSD = torch.stack(
        [block.experts(x_SD, torch.full((len(x_SD), 1), number), ones_S1) for number in range(experts)]
    )
    units_SND = torch.nn.functional.normalize(outputs_NSD.transpose(0, 1), dim=-1)
    cosine_SNN = units_SND @ units_SND.transpose(1, 2)
    return float((cosine_SNN.sum() / len(x_SD) - experts) / (experts * (experts - 1)))


def _with_moved_experts(blocks: dict[int, MoeBlock], look: Any) -> Any:
    """What `look` gives while each router's row n stands for expert n + 1; the rows are put back."""
    for block in blocks.values():
        block.router_weight.copy_(block.router_weight.roll(1, 0))
    found = look()
    for block in blocks.values():
        block.router_weight.copy_(block.router_weight.roll(-1, 0))
    return found
