"""Owns how PEFT experts are weighted and activated: shared by the trainable modules and the operator."""

from typing import Protocol

import torch
import torch.nn.functional as F

from perft.config import Activation, AdapterConfig


class BaseRouter(Protocol):
    """What PERFT asks of the base's router at one layer, for the T tokens of the step."""

    def logits(self) -> torch.Tensor:
        """Raw logits [T, N]."""

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight that the base applies to each expert it selected, [T, J], and the expert's number, [T, J].

        A number below 0 stands for none (padding).
        """

    def weights(self) -> torch.Tensor:
        """The same by expert: [T, N] float32, 0 where not selected."""


def weights_by_expert(weights_TJ: torch.Tensor, chosen_TJ: torch.Tensor, experts: int) -> torch.Tensor:
    """`BaseRouter.weights` from `BaseRouter.top`: [T, N] float32."""
    is_chosen_TJ = chosen_TJ >= 0
    zeros_TN = torch.zeros(weights_TJ.shape[0], experts, dtype=torch.float32, device=weights_TJ.device)
    weights_TJ = torch.where(is_chosen_TJ, weights_TJ.float(), 0.0)
    return zeros_TN.scatter_add(1, torch.where(is_chosen_TJ, chosen_TJ, 0).long(), weights_TJ)


def top_probabilities(logits_TN: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest probabilities of the full softmax, descending: [T, k] float32, not renormalised."""
    return torch.softmax(logits_TN.float(), dim=-1).topk(k, dim=-1).values


def chosen_experts(
    config: AdapterConfig, logits_TM: torch.Tensor, slot_probabilities_TK: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PERFT-R: the weights [T, K] float32 of the experts that each token uses, and their numbers [T, K].

    q = softmax over M; the top K kept, divided by their sum if `renormalize`. With `base_slot` the k-th
    largest is weighted by `slot_probabilities_TK` instead (docs/method.md, "The published OLMoE code").
    """
    assert config.top_k is not None
    weights_TK, chosen_TK = torch.softmax(logits_TM.float(), dim=-1).topk(config.top_k, dim=-1)
    if config.gate_weight == "base_slot":
        assert slot_probabilities_TK is not None
        weights_TK = slot_probabilities_TK
    elif config.renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, chosen_TK


def routed_weights(
    config: AdapterConfig, logits_TM: torch.Tensor, slot_probabilities_TK: torch.Tensor | None
) -> torch.Tensor:
    """The same by expert: [T, M] float32, 0 where not selected."""
    weights_TK, chosen_TK = chosen_experts(config, logits_TM, slot_probabilities_TK)
    return torch.zeros_like(logits_TM, dtype=torch.float32).scatter(1, chosen_TK, weights_TK)


def activate(activation: Activation | None, z: torch.Tensor) -> torch.Tensor:
    """Act of an expert, element by element; None (lora) is the identity."""
    match activation:
        case "silu":
            return F.silu(z)
        case "relu":
            return F.relu(z)
        case "gelu":
            return F.gelu(z)
        case None:
            return z
