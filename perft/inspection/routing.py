"""Owns what an adapter's routing does on given texts: which experts are used, how evenly, and how like the base's.

Letters as in perft/__init__.py; here T counts the tokens of all texts.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perft.hf import PerftAdapter
from perft.routing import chosen_experts


@dataclass(frozen=True)
class LayerRouting:
    """One layer: use_M, the share of the tokens that use each expert (they sum to K). entropy: of the uses, 0 to 1 (all
    experts alike). dead: experts that no token uses. overlap: normalised mutual information of the first choices of
    the adapter's and the base's router, 0 (independent) to 1; None for variant E, whose router is the base's."""

    use_M: list[float]
    entropy: float
    dead: list[int]
    overlap: float | None


@torch.no_grad()
def routing_on(
    model: Any, tokenizer: Any, adapter: PerftAdapter, texts: Sequence[str], max_length: int = 1024
) -> tuple[dict[int, LayerRouting], int]:
    """The routing at each layer over all tokens of the texts, and their number. Empty for D and S, which have none."""
    own: dict[int, list[torch.Tensor]] = defaultdict(list)
    first: dict[int, list[torch.Tensor]] = defaultdict(list)
    tokens = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
        tokens += ids.shape[1]
        model(ids.to(next(model.parameters()).device), use_cache=False)
        for index, layer in adapter.by_layer():
            base = adapter.base_routers[index]
            if adapter.config.variant == "E":
                own[index].append(base.top()[1])
            elif layer.router_logits_TM is not None:
                slots = torch.ones(len(layer.router_logits_TM), adapter.config.top_k or 1)  # of base_slot: not needed
                own[index].append(chosen_experts(adapter.config, layer.router_logits_TM, slots)[1])
                first[index].append(base.logits().argmax(dim=-1))
    return {
        index: _layer(torch.cat(chosen), torch.cat(first[index]) if first[index] else None, adapter.config.num_experts)
        for index, chosen in own.items()
    }, tokens


def _layer(chosen_TK: torch.Tensor, base_T: torch.Tensor | None, experts: int) -> LayerRouting:
    uses_M = chosen_TK.flatten().bincount(minlength=experts).float()
    share_M = uses_M / uses_M.sum()
    entropy = float(-(share_M * share_M.clamp(min=1e-30).log()).sum()) / math.log(experts) if experts > 1 else 1.0
    return LayerRouting(
        use_M=(uses_M / len(chosen_TK)).tolist(),
        entropy=entropy,
        dead=(uses_M == 0).nonzero().flatten().tolist(),
        overlap=None if base_T is None else mutual_information(chosen_TK[:, 0], base_T),
    )


def mutual_information(a_T: torch.Tensor, b_T: torch.Tensor) -> float:
    """I(a; b) / min(H(a), H(b)) of two labellings; 0 if one of them is constant."""
    joint_AB = torch.zeros(int(a_T.max()) + 1, int(b_T.max()) + 1)
    joint_AB.index_put_((a_T, b_T), torch.ones(len(a_T)), accumulate=True)
    joint_AB /= joint_AB.sum()
    a, b = _entropy(joint_AB.sum(1)), _entropy(joint_AB.sum(0))
    smaller = min(a, b)
    return max(0.0, (a + b - _entropy(joint_AB.flatten())) / smaller) if smaller > 1e-9 else 0.0


def _entropy(p: torch.Tensor) -> float:
    return float(-(p * p.clamp(min=1e-30).log()).sum())
