"""Owns what an adapter's routing does on given texts: which experts are used, how evenly, and how like the base's.

Letters as in perft/__init__.py; here T counts the tokens of all texts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perft.hf import PerftAdapter
from perft.inspection.figures import counted
from perft.routing import chosen_experts

TOKENS_PER_EXPERT = 20
"""Below that many tokens for each expert, the numbers of a routing are rough."""


@dataclass(frozen=True)
class LayerRouting:
    """One layer: use_M, the share of the tokens that use each expert (they sum to K). entropy: of the uses, 0 to 1 (all
    experts alike). dead: experts that no token uses. overlap: adjusted mutual information of the first choices of the
    adapter's and the base's router, 0 (no more than by chance) to 1; None for variant E, whose router is the base's."""

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
        if not ids.shape[1]:
            continue
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
    uses_M = chosen_TK.flatten().bincount(minlength=experts).double()
    return LayerRouting(
        use_M=(uses_M / len(chosen_TK)).tolist(),
        entropy=min(1.0, _entropy(uses_M) / math.log(experts)) if experts > 1 else 1.0,
        dead=(uses_M == 0).nonzero().flatten().tolist(),
        overlap=None if base_T is None else mutual_information(chosen_TK[:, 0], base_T),
    )


def few_tokens(tokens: int, experts: int) -> str | None:
    """What to say where so few tokens were routed that the numbers are rough; None for enough."""
    enough = TOKENS_PER_EXPERT * experts
    if tokens >= enough:
        return None
    return (
        f"{counted(tokens, 'token')} for {counted(experts, 'expert')}: use, entropy, overlap and dead experts are "
        f"rough below {enough:,} tokens ({TOKENS_PER_EXPERT} for each expert); give more texts"
    )


def mutual_information(a_T: torch.Tensor, b_T: torch.Tensor) -> float:
    """Adjusted mutual information of two labellings, (I - E) / (min(H(a), H(b)) - E), and 0 where that is below 0.

    I: their mutual information, H: entropy. E: the mean of I over all pairings of the same labels, so that 0 is what
    independent labellings give with however few tokens; 1: one follows from the other. A constant one gives 0.
    Source: Vinh, Epps, Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11 (2010), 2837-2854.
    """
    columns = int(b_T.max()) + 1
    joint = (a_T * columns + b_T).bincount(minlength=(int(a_T.max()) + 1) * columns)
    joint_AB = joint.view(-1, columns).double()
    uses_A, uses_B = joint_AB.sum(1), joint_AB.sum(0)
    a, b = _entropy(uses_A), _entropy(uses_B)
    chance = _chance(uses_A, uses_B)
    most = min(a, b) - chance
    return max(0.0, (a + b - _entropy(joint_AB.flatten()) - chance) / most) if most > 1e-9 else 0.0


def _chance(uses_A: torch.Tensor, uses_B: torch.Tensor) -> float:
    """E: the sum over the pairs of labels, used a and b times, and over n, how often they may meet, of
    n / T log(T n / (a b)), times the hypergeometric probability of n."""
    total, found = int(uses_A.sum()), 0.0
    log_factorial = torch.lgamma(torch.arange(total + 1, dtype=torch.float64) + 1)
    by_A, by_B = (Counter(int(uses) for uses in each.tolist() if uses) for each in (uses_A, uses_B))
    for a, times_a in by_A.items():
        for b, times_b in by_B.items():
            n = torch.arange(max(1, a + b - total), min(a, b) + 1)
            ways = log_factorial[a] + log_factorial[b] + log_factorial[total - a] + log_factorial[total - b]
            of = log_factorial[total] + log_factorial[n] + log_factorial[a - n] + log_factorial[b - n]
            probability = (ways - of - log_factorial[total - a - b + n]).exp()
            met = n.double() / total
            found += times_a * times_b * float((met * (met * total**2 / (a * b)).log() * probability).sum())
    return found


def _entropy(uses: torch.Tensor) -> float:
    p = uses[uses > 0] / uses.sum()
    return float(-(p * p.log()).sum())
