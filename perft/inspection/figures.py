"""Owns the sizes of an adapter: parameters, those a token activates, rows and bytes, beside those of its base.

Formulas: docs/method.md, "Figures" (arXiv 2411.08212, section on activated parameter efficiency).
"""

from dataclasses import dataclass

from torch import nn

from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.hf import moe_blocks
from perft.operator.tables import adapter_rows


@dataclass(frozen=True)
class Figures:
    """parameters, activated: of the adapter, and those that one token uses. rows: of the server's pool."""

    parameters: int
    activated: int
    rows: int
    row_bytes: int

    @property
    def device_bytes(self) -> int:
        """What it takes in the server's pool."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class BaseFigures:
    """The same of the base."""

    parameters: int
    activated: int


def figures(config: AdapterConfig, base: BaseShape) -> Figures:
    """On a base of this shape, whose dtype is the served one."""
    layers, d, b, m = (
        len(config.layer_indices(base.moe_layers)),
        base.hidden_size,
        config.bottleneck,
        config.num_experts,
    )
    router = m * d if config.is_routed else 0
    used = {"R": config.top_k or 0, "E": base.top_k, "D": m, "S": 1}[config.variant]
    return Figures(
        parameters=layers * (router + 2 * m * d * b),
        activated=layers * (router + 2 * used * d * b),
        rows=adapter_rows(config, base.moe_layers),
        row_bytes=d * base.dtype.itemsize,
    )


def base_figures(model: nn.Module, shape: BaseShape) -> BaseFigures:
    """Of a model, which may be on the meta device. A tied matrix counts once."""
    total = sum(each.numel() for each in model.parameters())
    experts = sum(each.numel() for block in moe_blocks(model).values() for each in block.experts.parameters())
    return BaseFigures(total, total - experts + experts * shape.top_k // shape.num_experts)


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def in_words(config: AdapterConfig, base: BaseShape) -> str:
    """The variant, the experts, and how many of them a token uses."""
    used = {
        "R": f", {config.top_k} a token", "E": f", {base.top_k} a token (the base router's choice)",
        "D": ", all for every token", "S": "",
    }[config.variant]  # fmt: skip
    return f"PERFT-{config.variant}, {counted(config.num_experts, f'{config.expert_type} expert')}{used}"


def told(config: AdapterConfig, own: Figures, shape: BaseShape, base: BaseFigures) -> list[tuple[str, str]]:
    """The figures in words, a line each."""
    return [
        ("adapter", f"{in_words(config, shape)}, bottleneck {config.bottleneck}"),
        ("parameters", _share(own.parameters, base.parameters)),
        ("activated by a token", _share(own.activated, base.activated)),
        ("rows in the pool", f"{own.rows:,} ({own.device_bytes / 1e6:.2f} MB on the device)"),
    ]


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.3%} of the base's {of:,})"
