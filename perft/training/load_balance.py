"""Owns the auxiliary loss that spreads tokens over experts, of the base's routers and of the adapter's own."""

from collections.abc import Sequence

import torch
from torch import nn

from perft.hf import MoeBlock, PerftAdapter
from perft.hf.adapter import HookedRouter


def load_balancing_loss(logits: Sequence[torch.Tensor], top_k: int, mask_T: torch.Tensor) -> torch.Tensor:
    """N sum_i f_i P_i over the tokens of all layers: f_i the share of tokens that choose expert i, P_i its mean
    probability (Switch Transformers, arXiv 2101.03961, equations 4 to 6, with `top_k` choices a token as in Mixtral).

    logits: [T, N] for each layer. mask_T: 0 for padding. It is `top_k` where all experts are used alike.
    """
    probabilities_LTN = torch.softmax(torch.stack(list(logits)).float(), dim=-1)
    chosen_LTK = probabilities_LTN.topk(top_k, dim=-1).indices
    is_chosen_LTN = torch.zeros_like(probabilities_LTN).scatter_(-1, chosen_LTK, 1.0)
    weight_LT1 = mask_T.to(probabilities_LTN).expand(len(logits), -1).unsqueeze(-1)
    total = weight_LT1.sum()
    share_N = (is_chosen_LTN * weight_LT1).sum(dim=(0, 1)) / total
    mean_N = (probabilities_LTN * weight_LT1).sum(dim=(0, 1)) / total
    return probabilities_LTN.shape[-1] * (share_N * mean_N).sum()


class BaseRouters:
    """The logits of the base's routers in the last forward pass, at every MoE layer."""

    def __init__(self, blocks: dict[int, MoeBlock], top_k: int) -> None:
        self._top_k = top_k
        self._routers: list[HookedRouter] = []
        for block in blocks.values():
            router = HookedRouter(len(block.router_weight))
            block.router.register_forward_hook(router.keep_logits)
            self._routers.append(router)

    def loss(self, mask_T: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss([router.logits() for router in self._routers], self._top_k, mask_T)


def adapter_loss(adapter: PerftAdapter, mask_T: torch.Tensor) -> torch.Tensor:
    """Of the adapter's own routers (R); 0 for the other variants."""
    logits = [layer.router_logits_TM for _, layer in adapter.by_layer() if layer.router_logits_TM is not None]
    if not logits or adapter.config.top_k is None:
        return mask_T.new_zeros((), dtype=torch.float32)
    return load_balancing_loss(logits, adapter.config.top_k, mask_T)


def router_losses(base: BaseRouters | None, adapter: nn.Module | None, mask_T: torch.Tensor) -> torch.Tensor:
    """The sum of both."""
    losses = [base.loss(mask_T)] if base is not None else []
    if isinstance(adapter, PerftAdapter):
        losses.append(adapter_loss(adapter, mask_T))
    return torch.stack(losses).sum() if losses else mask_T.new_zeros((), dtype=torch.float32)
