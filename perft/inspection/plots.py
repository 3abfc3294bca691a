"""Owns the plots of `perft inspect`: use by layer and expert, and the geometry of the paper's Figure 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perft.inspection.routing import LayerRouting
from perft.reference import LayerWeights


def draw(
    output: Path, title: str, routing: Mapping[int, LayerRouting], layer: int, base_router_ND: torch.Tensor,
    weights: LayerWeights,
) -> None:  # fmt: skip
    """One picture: the heat map where there is routing, and the vectors of one layer. Raises OSError."""
    from matplotlib import pyplot

    panels = 2 if routing else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(6.5 * panels, 6), squeeze=False, layout="constrained")
    figure.suptitle(title)
    if routing:
        _heat_map(axes[0][0], routing)
    _geometry(axes[0][-1], layer, base_router_ND, weights)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def projected(groups: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each group's unit vectors [n, D] on the two main axes of all of them together (PCA): [n, 2]."""
    units = {name: torch.nn.functional.normalize(each.detach().float().cpu(), dim=1) for name, each in groups.items()}
    together = torch.cat(list(units.values()))
    center_D = together.mean(dim=0)
    axes = torch.linalg.svd(together - center_D, full_matrices=False).Vh[:2]
    return {name: (each - center_D) @ axes.T for name, each in units.items()}


def _heat_map(axes: Any, routing: Mapping[int, LayerRouting]) -> None:
    layers = sorted(routing)
    picture = axes.imshow([routing[layer].use_M for layer in layers], aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="PEFT expert", ylabel="decoder layer", title="share of the tokens that use an expert")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(picture, ax=axes)


def _geometry(axes: Any, layer: int, base_router_ND: torch.Tensor, weights: LayerWeights) -> None:
    keys = weights.down_proj.flatten(0, 1)
    groups = {"base router": base_router_ND, "key memory vectors (down)": keys}
    if weights.router is not None:
        groups["adapter router"] = weights.router
    places = projected(groups)
    experts = torch.arange(weights.down_proj.shape[0]).repeat_interleave(weights.down_proj.shape[1])
    at = places["key memory vectors (down)"]
    axes.scatter(at[:, 0], at[:, 1], c=experts, cmap="tab10", s=14, alpha=0.6, label="key memory vectors (down)")
    at = places["base router"]
    axes.scatter(at[:, 0], at[:, 1], marker="^", color="black", s=40, label="base router")
    if "adapter router" in places:
        at = places["adapter router"]
        axes.scatter(at[:, 0], at[:, 1], marker="*", c=range(len(at)), cmap="tab10", edgecolors="black", s=160,
                     label="adapter router")  # fmt: skip
    axes.set(title=f"layer {layer}: unit vectors on their two main axes", xlabel="first", ylabel="second")
    axes.legend()
