"""Checkpoints in the published layout, and the authors' maths restated, from docs/method.md's tables alone.

Independent of perft/convert and perft/hf: nothing of them is imported here.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

BLOCK = {"olmoe": "mlp", "mixtral": "block_sparse_moe"}
Tensors = dict[str, torch.Tensor]


def unit(kind: str, size: int, hidden: int, generator: torch.Generator) -> Tensors:
    """One PEFT expert: LoRA's A [r, D] and B [D, r], or the two layers of a parallel adapter."""
    down = torch.randn(size, hidden, generator=generator) / hidden**0.5
    up = torch.randn(hidden, size, generator=generator) / size**0.5
    names = ("lora_A.weight", "lora_B.weight") if kind == "LoRA" else ("adapter_w1.weight", "adapter_w2.weight")
    return dict(zip(names, (down, up), strict=True))


def checkpoint(
    model_type: str, variant: str, kind: str, layers: int, hidden: int, base_experts: int, seed: int = 0,
    size: int = 6, experts: int = 4, top_k: int = 2, per_expert_names: bool = False,
) -> tuple[dict[str, Any], Tensors]:  # fmt: skip
    """config.json and the tensors of one published checkpoint. variant: S, D, R or E."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    arguments = (
        {"r": size, "lora_alpha": 2 * size, "lora_dropout": 0.05}
        if kind == "LoRA"
        else {"hidden_dim": size, "hidden_act": "silu", "dropout": 0.05}
    )
    config: dict[str, Any] = {
        "model_type": f"{model_type}-adapter",
        "shared_adapter": variant in "SD", "shared_routing_adapter": variant == "R",
        "embedded_routing_adapter": variant == "E",
    }  # fmt: skip
    if variant in "SD":
        count = 1 if variant == "S" else experts
        config |= {"shared_adapter_num": count, "shared_adapter_type": kind, "shared_adapter_args": arguments}
        prefix = "shared_adapter.{}.unit"
    elif variant == "R":
        count = experts
        config |= {
            "shared_routing_adapter_num_experts": count, "shared_routing_adapter_num_experts_per_tok": top_k,
            "shared_routing_adapter_type": kind, "shared_routing_adapter_args": arguments,
        }  # fmt: skip
        prefix = "shared_routing_adapter.{}.unit"
    else:
        count = base_experts
        config |= {"embedded_routing_adapter_type": kind, "embedded_routing_adapter_args": arguments}
        prefix = "experts.{}" if per_expert_names else "experts.{}.embedded_routing_adapter.unit"
    for layer in range(layers):
        block = f"model.layers.{layer}.{BLOCK[model_type]}"
        if variant == "R":
            router = torch.randn(count, hidden, generator=generator) / hidden**0.5 * 3
            tensors[f"{block}.shared_routing_adapter_gate.weight"] = router.bfloat16()
        for m in range(count):
            for name, tensor in unit(kind, size, hidden, generator).items():
                tensors[f"{block}.{prefix.format(m)}.{name}"] = tensor
    return config, tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def expert_output(
    tensors: Tensors, prefix: str, config: dict[str, Any], which: str, x_TD: torch.Tensor
) -> torch.Tensor:
    """One PEFT expert on all tokens."""
    arguments = config[f"{which}_args"]
    if config[f"{which}_type"] == "LoRA":
        scale = arguments["lora_alpha"] / arguments["r"]
        return scale * (x_TD @ tensors[f"{prefix}.lora_A.weight"].T) @ tensors[f"{prefix}.lora_B.weight"].T
    return F.silu(x_TD @ tensors[f"{prefix}.adapter_w1.weight"].T) @ tensors[f"{prefix}.adapter_w2.weight"].T


def delta(
    model_type: str, config: dict[str, Any], tensors: Tensors, layer: int, x_TD: torch.Tensor,
    base_logits_TN: torch.Tensor, base_top_k: int, base_renormalizes: bool,
) -> torch.Tensor:  # fmt: skip
    """What the authors' code adds to the block's output, token by token."""
    block = f"model.layers.{layer}.{BLOCK[model_type]}"
    p_TN = F.softmax(base_logits_TN.float(), dim=-1)
    top_TJ, chosen_TJ = p_TN.topk(base_top_k, dim=-1)
    if config["shared_adapter"]:
        outputs = [
            expert_output(tensors, f"{block}.shared_adapter.{m}.unit", config, "shared_adapter", x_TD)
            for m in range(config["shared_adapter_num"])
        ]
        return torch.stack(outputs).sum(dim=0)
    added_TD = torch.zeros_like(x_TD)
    if config["shared_routing_adapter"]:
        count, top_k = (config[f"shared_routing_adapter_num_experts{rest}"] for rest in ("", "_per_tok"))
        gate = tensors[f"{block}.shared_routing_adapter_gate.weight"].float()
        q_TK, sigma_TK = F.softmax((x_TD @ gate.T).float(), dim=-1).topk(top_k, dim=-1)
        weights_TK = top_TJ[:, :top_k] if model_type == "olmoe" else q_TK / q_TK.sum(dim=-1, keepdim=True)
        for m in range(count):
            output_TD = expert_output(
                tensors, f"{block}.shared_routing_adapter.{m}.unit", config, "shared_routing_adapter", x_TD
            )
            added_TD += ((sigma_TK == m) * weights_TK).sum(dim=-1, keepdim=True) * output_TD
        return added_TD
    weights_TJ = top_TJ / top_TJ.sum(dim=-1, keepdim=True) if base_renormalizes else top_TJ
    for e in range(base_logits_TN.shape[1]):
        prefix = f"{block}.experts.{e}.embedded_routing_adapter.unit"
        output_TD = expert_output(tensors, prefix, config, "embedded_routing_adapter", x_TD)
        added_TD += ((chosen_TJ == e) * weights_TJ).sum(dim=-1, keepdim=True) * output_TD
    return added_TD
