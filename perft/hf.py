"""Owns the trainable form of PERFT: modules that attach to the MoE blocks of a Hugging Face model.

    model = AutoModelForCausalLM.from_pretrained(...)
    adapter = attach(model, config)         # the base is frozen, the adapter's parameters train
    ...
    save(adapter, folder)                   # docs/format.md's two files

Invariant: attaching adds a term to a block's output and freezes the model, and changes nothing else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from perft.base_model import BaseShape, base_fingerprint, base_of_config, fit_violations
from perft.config import AdapterConfig
from perft.reference import LayerWeights
from perft.routing import activate, routed_weights, top_probabilities


class PerftLayer(nn.Module):
    """One adapter at one MoE layer: router [M, D] (R only), down_proj [M, B, D], up_proj [M, D, B].

    Initialised as in the paper's code, except that `up_proj` starts at exactly zero, so that a fresh adapter equals the
    base bit for bit: down ~ N(0, sqrt(2 / B)), router ~ N(0, 0.02).
    """

    def __init__(self, config: AdapterConfig, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        m, b, d = config.num_experts, config.bottleneck, hidden_size
        self.config, self.dropout = config, dropout
        self.router = nn.Parameter(torch.randn(m, d) * 0.02) if config.is_routed else None
        self.down_proj = nn.Parameter(torch.randn(m, b, d) * (2 / b) ** 0.5)
        self.up_proj = nn.Parameter(torch.zeros(m, d, b))

    def expert_weights(
        self, x_TD: torch.Tensor, base_logits_TN: torch.Tensor, base_weights_TN: torch.Tensor
    ) -> torch.Tensor:
        """Weight of every PEFT expert for every token, [T, M] float32, 0 where not selected."""
        config = self.config
        if config.variant == "E":
            return base_weights_TN.float()
        if self.router is None:
            return torch.ones(x_TD.shape[0], config.num_experts, device=x_TD.device)
        slots_TK = None
        if config.gate_weight == "base_slot" and config.top_k is not None:
            slots_TK = top_probabilities(base_logits_TN, config.top_k)
        return routed_weights(config, F.linear(x_TD.float(), self.router.float()), slots_TK)

    def forward(self, x_TD: torch.Tensor, base_logits_TN: torch.Tensor, base_weights_TN: torch.Tensor) -> torch.Tensor:
        """The adapter's delta [T, D] in x's dtype; all experts are computed, those not selected have weight 0."""
        config = self.config
        w_TM = self.expert_weights(x_TD, base_logits_TN, base_weights_TN)
        x_TD = x_TD.to(self.down_proj.dtype)
        drop = self.training and self.dropout > 0
        if config.expert_type == "lora":
            x_in = F.dropout(x_TD, self.dropout) if drop else x_TD
            a_TMB = torch.einsum("td,mbd->tmb", x_in, self.down_proj)
        else:
            z_TMB = torch.einsum("td,mbd->tmb", x_TD, self.down_proj)
            z_TMB = F.dropout(z_TMB, self.dropout) if drop else z_TMB
            a_TMB = activate(config.activation, z_TMB)
        gated_TMB = a_TMB * (w_TM * config.scale).unsqueeze(2).to(a_TMB.dtype)
        return torch.einsum("tmb,mdb->td", gated_TMB, self.up_proj)

    def weights(self) -> LayerWeights:
        """The parameters in the form that the reference takes."""
        return LayerWeights(self.router, self.down_proj, self.up_proj)


class PerftAdapter(nn.Module):
    """One adapter on one model: a `PerftLayer` for every layer that carries it. `enabled` switches all of them."""

    def __init__(self, config: AdapterConfig, layers: dict[int, PerftLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self.enabled = True
        self._attached: list[tuple[nn.Module, RemovableHandle]] = []

    def attach_to(self, blocks: dict[int, nn.Module]) -> None:
        """Add each layer's delta to its block's output. Raises ValueError if another adapter is attached."""
        for index, _ in self.by_layer():
            if getattr(blocks[index], "perft_layer", None):
                raise ValueError(f"layer {index} already carries an adapter: detach that one first")
        for index, layer in self.by_layer():
            object.__setattr__(blocks[index], "perft_layer", layer)  # known to the block, but no submodule of it
            self._attached.append((blocks[index], blocks[index].register_forward_hook(self._add_delta)))

    def detach_from_model(self) -> None:
        """Detach the adapter from its model; it keeps its parameters, and the model stays frozen."""
        for block, handle in self._attached:
            handle.remove()
            object.__delattr__(block, "perft_layer")
        self._attached.clear()

    def _add_delta(self, block: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of a block; the adapter follows its model's training mode."""
        layer: Any = block.perft_layer
        if not self.enabled:
            return output
        if layer.training != block.training:
            layer.train(block.training)
        x_TD = inputs[0].flatten(0, -2)
        # forward(), not the call: transformers records each call of a router for its auxiliary loss
        logits_TN, scores_TJ, chosen_TJ = block.get_submodule("gate").forward(x_TD)
        weights_TN = torch.zeros_like(logits_TN, dtype=torch.float32).scatter(1, chosen_TJ, scores_TJ.float())
        delta_TD: torch.Tensor = layer(x_TD, logits_TN, weights_TN)
        return output + delta_TD.to(output.dtype).view_as(output)

    def by_layer(self) -> Iterator[tuple[int, PerftLayer]]:
        for index, layer in self.layers.items():
            assert isinstance(layer, PerftLayer)
            yield int(index), layer

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `adapter_model.safetensors`, by their names in docs/format.md."""
        named: dict[str, torch.Tensor] = {}
        for index, layer in self.by_layer():
            if layer.router is not None:
                named[f"layers.{index}.router"] = layer.router.detach().contiguous()
            named[f"layers.{index}.down_proj"] = layer.down_proj.detach().contiguous()
            named[f"layers.{index}.up_proj"] = layer.up_proj.detach().contiguous()
        return named


def moe_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The MoE blocks of a Hugging Face OLMoE, Mixtral or Qwen3-MoE model, by decoder layer.

    Raises ValueError if the model has none of theirs.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    known = (MixtralSparseMoeBlock, OlmoeSparseMoeBlock, Qwen3MoeSparseMoeBlock)
    decoder: Any = getattr(getattr(model, "model", None), "layers", ())
    blocks = {i: layer.mlp for i, layer in enumerate(decoder) if isinstance(getattr(layer, "mlp", None), known)}
    if not blocks:
        raise ValueError(f"found no MoE block in {type(model).__name__}; expected an OLMoE, Mixtral or Qwen3-MoE model")
    return blocks


def shape_of(model: nn.Module) -> BaseShape:
    """The base's shape and fingerprint, from the model itself (see `moe_blocks` for the models supported)."""
    blocks = moe_blocks(model)
    config: Any = model.config
    shape = base_of_config(config, next(model.parameters()).dtype)
    assert shape is not None
    fingerprint = base_fingerprint(block.get_submodule("gate").get_parameter("weight") for block in blocks.values())
    return BaseShape(**{**shape.__dict__, "moe_layers": tuple(blocks), "fingerprint": fingerprint})


def attach(model: nn.Module, config: AdapterConfig, dropout: float = 0.0) -> PerftAdapter:
    """Freeze `model` and attach a fresh adapter to its MoE blocks; one adapter at a time.

    Raises ValueError, with every reason, if the configuration does not fit the model.
    """
    blocks, shape = moe_blocks(model), shape_of(model)
    if violations := fit_violations(config, shape):
        raise ValueError("; ".join(violations))
    model.requires_grad_(False)
    device = next(model.parameters()).device
    layers = {
        index: PerftLayer(config, shape.hidden_size, dropout).to(device)
        for index in config.layer_indices(shape.moe_layers)
    }
    adapter = PerftAdapter(config, layers)
    adapter.attach_to(blocks)
    return adapter


def save(adapter: PerftAdapter, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write docs/format.md's two files into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(adapter.config.file_json(), encoding="utf-8")
    tensors = {name: tensor.cpu().to(dtype) for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable only by its owner
