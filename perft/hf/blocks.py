"""Owns where the MoE blocks of a Hugging Face model are, found by shape: they have `experts` and a `gate` or `router`.

In transformers 5 nearly every family calls `experts(x [T, D], chosen [T, J], weights [T, J])`; there the delta is added
to what the experts return, and PERFT-E takes the weights from the call. A family that calls them otherwise (Llama-4)
gets the delta on the block's output, and no PERFT-E.

Invariant: what is found is either a block whose every part is known, or the model is refused with the reason.
"""

import inspect
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perft.base_model import BaseShape, base_fingerprint

_BLOCK = re.compile(r"(.*?)\blayers\.(\d+)\.([^.]+)")
_ROUTERS = ("gate", "router")
_TOP_K_CALL = 3
"""What `experts` takes where it is handed the router's choice: x, chosen, weights."""


class UnsupportedModelError(ValueError):
    """The model has no MoE block that an adapter could be attached to; the text says why."""


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block and its parts. `hands_over_top_k`: whether `experts` is called with the router's choice."""

    module: nn.Module
    router: nn.Module
    experts: nn.Module
    hands_over_top_k: bool

    @property
    def router_weight(self) -> torch.Tensor:
        """[N, D]."""
        return _matrices(self.router)[0]


def moe_blocks(model: nn.Module) -> dict[int, MoeBlock]:
    """The MoE blocks of a model, by decoder layer. Raises UnsupportedModelError if there are none, or unknown ones."""
    by_stack: dict[str, dict[int, MoeBlock]] = defaultdict(dict)
    for name, module in model.named_modules():
        where = _BLOCK.fullmatch(name)
        if where is None or getattr(module, "experts", None) is None:
            continue
        index = int(where[2])
        if index in by_stack[where[1]]:
            raise UnsupportedModelError(f"{type(model).__name__} has several MoE blocks in decoder layer {index}")
        by_stack[where[1]][index] = _block(name, module)
    if not by_stack:
        raise UnsupportedModelError(
            f"found no MoE block in {type(model).__name__}: PERFT adapts Mixture-of-Experts models, whose decoder "
            "layers have `experts` and a `gate` or `router`"
        )
    if len(by_stack) > 1:
        stacks = ", ".join(f"{prefix}layers" for prefix in sorted(by_stack))
        raise UnsupportedModelError(f"{type(model).__name__} has several stacks of MoE layers ({stacks}), expected one")
    (blocks,) = by_stack.values()
    return dict(sorted(blocks.items()))


def _block(name: str, module: nn.Module) -> MoeBlock:
    experts: Any = module.experts
    router = next((part for part in (getattr(module, each, None) for each in _ROUTERS) if part is not None), None)
    if not isinstance(experts, nn.Module) or not isinstance(router, nn.Module):
        raise UnsupportedModelError(f"{name} ({type(module).__name__}) has experts, and neither `gate` nor `router`")
    if (found := len(_matrices(router))) != 1:
        raise UnsupportedModelError(f"{name} ({type(module).__name__}) has a router of {found} matrices, expected one")
    taken = [
        parameter
        for parameter in inspect.signature(experts.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return MoeBlock(module, router, experts, len(taken) == _TOP_K_CALL)


def _matrices(router: nn.Module) -> list[torch.Tensor]:
    """Its own `weight`, or else every matrix within it."""
    own = getattr(router, "weight", None)
    if isinstance(own, torch.Tensor) and own.ndim == 2:
        return [own]
    return [parameter for parameter in router.parameters() if parameter.ndim == 2]


def shape_of(model: nn.Module) -> BaseShape:
    """The base's shape and fingerprint, from the model itself. Raises UnsupportedModelError (see `moe_blocks`).

    The fingerprint is that of the checkpoint only if the model was loaded in the checkpoint's dtype, or a wider one.
    """
    blocks = moe_blocks(model)
    config: Any = model.config
    text = config.get_text_config()
    first = next(iter(blocks.values()))
    num_experts, hidden_size = first.router_weight.shape
    if hidden_size != text.hidden_size:
        raise UnsupportedModelError(
            f"the router of {type(model).__name__} takes {hidden_size} numbers, and the hidden size is "
            f"{text.hidden_size}: its experts work on a projection of the hidden states"
        )
    is_real = first.router_weight.device.type != "meta"
    return BaseShape(
        hidden_size=hidden_size,
        num_layers=text.num_hidden_layers,
        moe_layers=tuple(blocks),
        num_experts=num_experts,
        top_k=_top_k(first, text),
        dtype=next(model.parameters()).dtype,
        fingerprint=base_fingerprint(block.router_weight for block in blocks.values()) if is_real else None,
        embedded_problem=None if first.hands_over_top_k else "its experts are not called with the router's weights",
    )


def _top_k(block: MoeBlock, text_config: Any) -> int:
    """J: experts that a token uses."""
    found = next(
        (
            value
            for owner, name in (
                (block.router, "top_k"),
                (block.module, "top_k"),
                (text_config, "num_experts_per_tok"),
                (text_config, "moe_k"),
                (text_config, "moe_topk"),
            )
            if isinstance(value := getattr(owner, name, None), int)
        ),
        None,
    )
    if found is None:
        raise UnsupportedModelError(f"{type(block.module).__name__} does not say how many experts a token uses")
    return found
