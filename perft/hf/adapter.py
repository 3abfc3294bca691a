"""Owns an adapter on a Hugging Face model: its layers, and the hooks by which they add to the model's experts.

Invariant: attaching adds a term to the experts' output and freezes the model, and changes nothing else.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from perft.base_model import fit_violations
from perft.config import AdapterConfig
from perft.hf.base import fingerprint_of
from perft.hf.blocks import MoeBlock, moe_blocks, shape_of
from perft.hf.layer import PerftLayer
from perft.routing import weights_by_expert


class HookedRouter:
    """What one block's router said in this forward pass (a `perft.routing.BaseRouter`), filled by hooks."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.logits_TN: torch.Tensor | None = None
        self.top_TJ: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep_logits(self, router: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the router: of what it returns, the logits are the last that have N columns."""
        values = output if isinstance(output, tuple) else (output,)
        full = [value for value in values if value.is_floating_point() and value.shape[-1] == self.num_experts]
        self.logits_TN = full[-1].flatten(0, -2) if full else None

    def logits(self) -> torch.Tensor:
        if self.logits_TN is None:
            raise RuntimeError("the base's router returned no logits for all of its experts")
        return self.logits_TN

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.top_TJ is not None, "PERFT-E is refused where the experts are not called with their weights"
        return self.top_TJ

    def weights(self) -> torch.Tensor:
        return weights_by_expert(*self.top(), self.num_experts)


class PerftAdapter(nn.Module):
    """One adapter on one model: a `PerftLayer` for every layer that carries it. `enabled` switches all of them.

    `base_routers`: what the base's routers said in the last forward pass, by decoder layer.
    """

    def __init__(self, config: AdapterConfig, layers: dict[int, PerftLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self.enabled = True
        self.base_routers: dict[int, HookedRouter] = {}
        self._handles: list[RemovableHandle] = []
        self._carried: list[nn.Module] = []

    def attach_to(self, blocks: dict[int, MoeBlock]) -> None:
        """Add each layer's delta to its block's experts. Raises ValueError if another adapter is attached."""
        for index, _ in self.by_layer():
            if getattr(blocks[index].module, "perft_layer", None) is not None:
                raise ValueError(f"layer {index} already carries an adapter: detach that one first")
        for index, layer in self.by_layer():
            block = blocks[index]
            router = self.base_routers[index] = HookedRouter(len(block.router_weight))
            object.__setattr__(block.module, "perft_layer", layer)  # known to the block, but no submodule of it
            self._carried.append(block.module)
            self._handles.append(block.router.register_forward_hook(router.keep_logits))
            self._handles.append(self._hooked(block, layer, router))

    def detach_from_model(self) -> None:
        """Detach the adapter from its model; it keeps its parameters, and the model stays frozen."""
        for handle in self._handles:
            handle.remove()
        for module in self._carried:
            object.__delattr__(module, "perft_layer")
        self._handles.clear()
        self._carried.clear()
        self.base_routers.clear()

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

    def _hooked(self, block: MoeBlock, layer: PerftLayer, router: HookedRouter) -> RemovableHandle:
        """The hook that adds the delta: on the experts, or on the block where these are called otherwise."""
        taken = inspect.signature(block.experts.forward)

        def after_experts(experts: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            x_TD, chosen_TJ, weights_TJ = taken.bind(*inputs, **named).args
            router.top_TJ = (weights_TJ.flatten(0, -2), chosen_TJ.flatten(0, -2))
            return self._with_delta(layer, router, x_TD, output, block.module.training)

        def after_block(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            x_BTD = inputs[0] if inputs else next(iter(named.values()))
            if isinstance(output, tuple):
                return (self._with_delta(layer, router, x_BTD, output[0], module.training), *output[1:])
            return self._with_delta(layer, router, x_BTD, output, module.training)

        if block.hands_over_top_k:
            return block.experts.register_forward_hook(after_experts, with_kwargs=True)
        return block.module.register_forward_hook(after_block, with_kwargs=True)

    def _with_delta(
        self, layer: PerftLayer, router: HookedRouter, x: torch.Tensor, output: torch.Tensor, is_training: bool
    ) -> torch.Tensor:
        """The output plus the layer's delta, which follows its model's training mode."""
        if not self.enabled:
            return output
        if layer.training != is_training:
            layer.train(is_training)
        delta_TD: torch.Tensor = layer(x.flatten(0, -2), router)
        return output + delta_TD.to(output.dtype).view_as(output)


def attach(model: nn.Module, config: AdapterConfig, dropout: float = 0.0, up_std: float = 0.0) -> PerftAdapter:
    """Freeze `model` and attach a fresh adapter to its MoE blocks; one adapter at a time. See `PerftLayer`.

    Without a `base_fingerprint` the adapter's configuration gets that of the checkpoint that the model was loaded from.

    Raises ValueError, with every reason, if the configuration does not fit the model, or UnsupportedModelError.
    """
    blocks, shape = moe_blocks(model), shape_of(model)
    if violations := fit_violations(config, shape):
        raise ValueError("; ".join(violations))
    if config.base_fingerprint is None:
        loaded_from = getattr(getattr(model, "config", None), "_name_or_path", "")
        fingerprint = fingerprint_of(loaded_from, shape) if loaded_from else None
        config = config.model_copy(update={"base_fingerprint": fingerprint})
    model.requires_grad_(False)
    device = next(model.parameters()).device
    layers = {
        index: PerftLayer(config, shape.hidden_size, dropout, up_std).to(device)
        for index in config.layer_indices(shape.moe_layers)
    }
    adapter = PerftAdapter(config, layers)
    adapter.attach_to(blocks)
    return adapter
