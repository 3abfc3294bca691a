"""Owns the plots of `perft inspect`: use by layer and expert, and the geometry of the paper's Figure 3.

An expert that is told apart has one colour and one number wherever it is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perft.inspection.figures import counted
from perft.inspection.routing import LayerRouting
from perft.reference import LayerWeights

ENDINGS = (".png", ".pdf", ".svg")
TOLD_APART = 12
"""So many experts have a colour and a number of their own; where there are more, the rest is grey."""
NUMBERED_BASE = 16
"""Up to so many base experts have their numbers in the plot."""
CELLS_WITH_NUMBERS = (32, 16)
"""Layers and experts up to which the numbers of the heat map fit into its cells."""

KEYS, BASE, ROUTER = "keys", "base", "router"


@dataclass(frozen=True)
class Drawn:
    """What a picture shows. title: the adapter in words. routing: empty without texts, and for a variant without one.

    layer: whose vectors are drawn, base_router_ND and weights: of that layer.
    """

    title: str
    variant: str
    routing: Mapping[int, LayerRouting]
    tokens: int
    layer: int
    base_router_ND: torch.Tensor
    weights: LayerWeights


def draw(output: Path, drawn: Drawn) -> None:
    """One picture: the heat map where there is routing, and the vectors of one layer. Raises OSError."""
    from matplotlib import pyplot

    panels = 2 if drawn.routing else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(7.5 * panels, 7), squeeze=False, layout="constrained")
    figure.suptitle(drawn.title, parse_math=False)
    if drawn.routing:
        _heat_map(axes[0][0], drawn)
    _geometry(axes[0][-1], drawn)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def projected(groups: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Each group's unit vectors [n, D] on the two main axes of all of them together (PCA): [n, 2].

    And each axis' share of the variance.
    """
    units = {name: torch.nn.functional.normalize(each.detach().float().cpu(), dim=1) for name, each in groups.items()}
    together = torch.cat(list(units.values()))
    center_D = together.mean(dim=0)
    found = torch.linalg.svd(together - center_D, full_matrices=False)
    variance = found.S.square()
    shares = (variance[:2] / variance.sum().clamp(min=1e-30)).tolist()
    return {name: (each - center_D) @ found.Vh[:2].T for name, each in units.items()}, shares


def told_apart(experts: int, use_M: list[float] | None) -> list[int]:
    """The experts that get a colour and a number: all of them, or the most used ones, or the first ones."""
    if experts <= TOLD_APART:
        return list(range(experts))
    by_use = sorted(range(experts), key=lambda m: -(use_M[m] if use_M else 0))
    return sorted(by_use[:TOLD_APART])


def _heat_map(axes: Any, drawn: Drawn) -> None:
    layers = sorted(drawn.routing)
    use_LM = [drawn.routing[layer].use_M for layer in layers]
    experts = len(use_LM[0])
    picture = axes.imshow(use_LM, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xlabel="PEFT expert", ylabel="decoder layer",
        title=f"share of {counted(drawn.tokens, 'token')} that {'use' if drawn.tokens > 1 else 'uses'} an expert",
    )  # fmt: skip
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(layers) <= CELLS_WITH_NUMBERS[0] and experts <= CELLS_WITH_NUMBERS[1]:
        for row, use_M in enumerate(use_LM):
            for m, share in enumerate(use_M):
                color = "black" if share > 0.6 else "white"
                axes.text(m, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    uniform = sum(use_LM[0]) / experts
    bar = axes.figure.colorbar(picture, ax=axes, label=f"red line: uniform use, K / M = {uniform:.2f}")
    bar.ax.axhline(uniform, color="red", linewidth=2)


def _geometry(axes: Any, drawn: Drawn) -> None:
    weights = drawn.weights
    experts, keys = weights.down_proj.shape[:2]
    groups = {BASE: drawn.base_router_ND, KEYS: weights.down_proj.flatten(0, 1)}
    if weights.router is not None:
        groups[ROUTER] = weights.router
    places, shares = projected(groups)
    routing = drawn.routing.get(drawn.layer)
    shown = told_apart(experts, routing.use_M if routing else None)
    colors = _colors(shown)
    _keys(axes, places[KEYS].view(experts, keys, 2), colors)
    _base_router(axes, places[BASE], colors if drawn.variant == "E" else {})
    if ROUTER in places:
        _router(axes, places[ROUTER], colors)
    axes.set(
        title=f"layer {drawn.layer}: directions of the routers' and the experts' vectors",
        xlabel=f"principal component 1 ({shares[0]:.0%} of variance)",
        ylabel=f"principal component 2 ({shares[1]:.0%} of variance)",
    )
    axes.margins(0.08)
    _legend(axes, drawn, experts, shown)


def _colors(shown: list[int]) -> dict[int, Any]:
    from matplotlib import colormaps

    palette = [
        *(colormaps["tab10"](number) for number in range(10) if number != 7),
        "navy",
        "teal",
        "magenta",
    ]  # no grey
    return {m: palette[number] for number, m in enumerate(shown)}


def _keys(axes: Any, places_MB2: torch.Tensor, colors: Mapping[int, Any]) -> None:
    """Each key memory vector as the number of its expert; of the experts that are not told apart, as a grey dot."""
    for m, places_B2 in enumerate(places_MB2.tolist()):
        across, up = zip(*places_B2, strict=True)
        if m in colors:
            axes.scatter(across, up, marker=f"${m}$", color=colors[m], s=50 * len(str(m)), linewidths=0.3)
        else:
            axes.scatter(across, up, marker=".", color="lightgrey", s=20, zorder=0)


def _base_router(axes: Any, places_N2: torch.Tensor, colors: Mapping[int, Any]) -> None:
    """In the experts' colours for E, whose experts are the base's; else hollow, with their own numbers if they fit."""
    count = len(places_N2)
    numbered = set(colors) or set(range(count if count <= NUMBERED_BASE else 0))
    for n, (across, up) in enumerate(places_N2.tolist()):
        edge = colors.get(n, "dimgrey" if colors else "black")
        axes.scatter(across, up, marker="^", s=60, color=colors.get(n, "none"), edgecolors=edge, zorder=3)
        if n in numbered:
            _number(axes, n, across, up, edge)


def _router(axes: Any, places_M2: torch.Tensor, colors: Mapping[int, Any]) -> None:
    for m, (across, up) in enumerate(places_M2.tolist()):
        axes.scatter(across, up, marker="*", color=colors.get(m, "lightgrey"), edgecolors="black", s=220, zorder=4)
        if m in colors:
            _number(axes, m, across, up, colors[m])


def _number(axes: Any, number: int, across: float, up: float, color: Any) -> None:
    """Beside a symbol, with a white edge, so that it can be read above others."""
    from matplotlib import patheffects

    edge = [patheffects.withStroke(linewidth=3, foreground="white")]
    axes.annotate(str(number), (across, up), (6, 5), textcoords="offset points", color=color, fontsize=11,
                  fontweight="bold", path_effects=edge, zorder=5)  # fmt: skip


def _legend(axes: Any, drawn: Drawn, experts: int, shown: list[int]) -> None:
    """Below the axes, where it covers nothing."""
    from matplotlib.lines import Line2D

    def entry(marker: str, label: str, **look: Any) -> Any:
        return Line2D([], [], linestyle="", marker=marker, label=label, **({"color": "black"} | look))

    count = len(drawn.base_router_ND)
    base = f"base router ({counted(count, 'expert')}{'' if count <= NUMBERED_BASE else ', without numbers'})"
    if drawn.variant == "E":
        base = "base router, in the colour of its expert"
    entries = [
        entry(f"${shown[0]}$", "key memory vectors (rows of down): the number of their expert", color="C0"),
        entry("^", base, markerfacecolor="none"),
    ]
    if drawn.weights.router is not None:
        entries.append(entry("*", "adapter router, with the number of its expert", markersize=12))
    if len(shown) < experts:
        which = "most used" if drawn.layer in drawn.routing else "first"
        entries.append(entry(".", f"all but the {len(shown)} {which} of {experts} experts", color="lightgrey"))
    axes.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=9, frameon=False)
