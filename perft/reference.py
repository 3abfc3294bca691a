"""The definition of correct: PERFT's delta at one layer, in float32, one token and one expert at a time.

Everything else (trainable modules, every back end of the operator, the engine) is tested against this file, so it stays
the plainest possible statement of docs/method.md and docs/format.md.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from perft.config import AdapterConfig


@dataclass(frozen=True)
class LayerWeights:
    """One adapter's tensors at one layer: router [M, D] (R only), down_proj [M, B, D], up_proj [M, D, B]."""

    router: torch.Tensor | None
    down_proj: torch.Tensor
    up_proj: torch.Tensor


@dataclass(frozen=True)
class BaseRouting:
    """The base router's output: raw logits [T, N] and each expert's weight as applied [T, N] (0: not selected)."""

    logits_TN: torch.Tensor
    weights_TN: torch.Tensor


def expert_output(config: AdapterConfig, down_BD: torch.Tensor, up_DB: torch.Tensor, x_D: torch.Tensor) -> torch.Tensor:
    """Delta_m(x) = scale * up act(down x), shape [D]."""
    z_B = down_BD @ x_D
    if config.activation == "silu":
        z_B = F.silu(z_B)
    elif config.activation == "relu":
        z_B = F.relu(z_B)
    elif config.activation == "gelu":
        z_B = F.gelu(z_B)
    return config.scale * (up_DB @ z_B)


def expert_weights(
    config: AdapterConfig, router_MD: torch.Tensor | None, x_D: torch.Tensor, base_logits_N: torch.Tensor | None,
    base_weights_N: torch.Tensor | None,
) -> list[tuple[int, float]]:  # fmt: skip
    """(expert, weight) of every PEFT expert that is active for one token."""
    if config.variant in ("S", "D"):
        return [(m, 1.0) for m in range(config.num_experts)]
    if config.variant == "E":
        assert base_weights_N is not None
        return [(m, float(w)) for m, w in enumerate(base_weights_N) if w != 0]
    assert router_MD is not None and config.top_k is not None
    q_M = torch.softmax(router_MD @ x_D, dim=0)
    chosen = torch.argsort(q_M, descending=True)[: config.top_k].tolist()
    if config.gate_weight == "base_slot":
        assert base_logits_N is not None
        p_N = torch.softmax(base_logits_N.float(), dim=0).sort(descending=True).values
        return [(m, float(p_N[k])) for k, m in enumerate(chosen)]
    total = sum(float(q_M[m]) for m in chosen) if config.renormalize else 1.0
    return [(m, float(q_M[m]) / total) for m in chosen]


def reference_delta(
    config: AdapterConfig, weights: LayerWeights, x_TD: torch.Tensor, base: BaseRouting | None = None
) -> torch.Tensor:
    """sum_m w_m(x) Delta_m(x) for every token: [T, D], float32.

    `base` is needed for E and for R with `base_slot`.
    """
    x_TD = x_TD.float()
    down, up = weights.down_proj.float(), weights.up_proj.float()
    router = None if weights.router is None else weights.router.float()
    delta_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        logits_N = None if base is None else base.logits_TN[t]
        weights_N = None if base is None else base.weights_TN[t]
        for m, w in expert_weights(config, router, x_D, logits_N, weights_N):
            delta_TD[t] += w * expert_output(config, down[m], up[m], x_D)
    return delta_TD
