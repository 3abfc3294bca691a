"""Owns the pictures of docs/quality.md: accuracy against activated parameter efficiency (the paper's Figure 4) and
against the number of PEFT experts (Figure 5). The geometry (Figure 3) is drawn by perft.inspection."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.figures import Cell
from benchmarks.quality.grid import METHODS

COLORS = dict(zip(METHODS, ("black", "grey", "C0", "C1", "C2", "C3", "C4", "C5"), strict=True))
MARKERS = dict(zip(METHODS, "ox^vsDPX", strict=True))


def efficiency(file: Path, by_task: Mapping[str, Sequence[Cell]], base: Mapping[str, float]) -> None:
    """base: the base's own accuracy in each task."""
    figure, axes = _figure(len(by_task))
    for ax, (task, found) in zip(axes, by_task.items(), strict=True):
        ax.axhline(base.get(task, 0.0), color="grey", linestyle=":", label="base")
        for method in METHODS:
            ours = [cell for cell in found if cell.method == method]
            if ours:
                ax.errorbar(
                    [100 * cell.efficiency for cell in ours], [cell.mean for cell in ours],
                    yerr=[cell.half or 0.0 for cell in ours], label=METHODS[method].label, color=COLORS[method],
                    marker=MARKERS[method], capsize=3, linewidth=1,
                )  # fmt: skip
        ax.set(title=task, xscale="log", ylabel="accuracy",
               xlabel="activated parameters of the adapter / of the base (%)")  # fmt: skip
        ax.set_xticks(ticks := sorted({round(100 * cell.efficiency, 2) for cell in found if cell.method == "qvlora"}),
                      [f"{each:g}" for each in ticks])  # fmt: skip
        ax.xaxis.set_minor_locator(_nothing())
        ax.set_xlim(50 * min(cell.efficiency for cell in found), 200 * max(cell.efficiency for cell in found))
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)
    _save(figure, file)


def experts(file: Path, by_task: Mapping[str, Sequence[Cell]], all_experts: int) -> None:
    """all_experts: of the base, which is E's M."""
    figure, axes = _figure(len(by_task))
    for ax, (task, found) in zip(axes, by_task.items(), strict=True):
        for at, budget in enumerate(sorted({cell.budget for cell in found})):
            for method, of in METHODS.items():
                ours = [cell for cell in found if (cell.method, cell.budget) == (method, budget)]
                if ours and of.variant is not None:
                    m = of.experts or all_experts
                    ax.errorbar(
                        [m * (1 + 0.03 * at)], [ours[0].mean], yerr=[ours[0].half or 0.0], color=COLORS[method],
                        marker=MARKERS[method], markerfacecolor="none" if at else None, capsize=3, linestyle="",
                        label=f"{of.label}, budget {budget}",
                    )  # fmt: skip
        ax.set(title=task, xlabel="PEFT experts M", ylabel="accuracy", xscale="log")
        ax.set_xticks(ticks := (1, 2, 4, 8, all_experts), [str(each) for each in ticks])
        ax.xaxis.set_minor_locator(_nothing())
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7, ncols=2)
    _save(figure, file)


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(6.5 * panels, 5), squeeze=False, layout="constrained")
    return figure, axes[0]


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _save(figure: Any, file: Path) -> None:
    """The same bytes for the same numbers."""
    import matplotlib
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "perft", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
