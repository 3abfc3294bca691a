"""Writes the tables and pictures of docs/quality.md from the result files, so that no number there is typed by hand.

    python -m benchmarks.quality page

Between `<!-- quality:SECTION:begin -->` and `<!-- quality:SECTION:end -->` stands what the result files say.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import markdown
from benchmarks.quality import geometry, plots
from benchmarks.quality.base import Recipe
from benchmarks.quality.data import TASKS
from benchmarks.quality.figures import Cell, accuracy, cells, comparisons
from benchmarks.quality.grid import BASE, LIKE_LORA, LONGER, METHODS, ORDER, Run, planned
from benchmarks.quality.mistakes import KINDS
from benchmarks.quality.places import BASE as SMALL_BASE
from benchmarks.quality.places import EXPERTS, GEOMETRY, LARGER_PRETRAINING, MISTAKES, PAGE, RUNS

SECTION = re.compile(r"(<!-- quality:(\w+):begin -->\n).*?(<!-- quality:\2:end -->)", re.DOTALL)
BASE_EXPERTS = Recipe().experts
NOT_RUN = "Not run yet."
EFFICIENCY, AGAINST_M, DIRECTIONS = "quality-efficiency.svg", "quality-experts.svg", "quality-geometry.png"


def write() -> None:
    """The page and its pictures."""
    from benchmarks.quality.runs import results

    found = results(RUNS)
    geometry.keep(found)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw_grid(found, PAGE.parent)
    if GEOMETRY.is_dir():
        geometry.draw(PAGE.parent / DIRECTIONS)


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with every section as the results say."""
    return SECTION.sub(lambda found: f"{found[1]}{SECTIONS[found[2]](results) or NOT_RUN}\n{found[3]}", page)


def draw_grid(results: Mapping[str, Any], folder: Path) -> None:
    """The pictures of the grid, if there are results."""
    by_task = {task: found for task in TASKS if (found := cells(results, "small", task))}
    if by_task:
        plots.efficiency(folder / EFFICIENCY, by_task, {task: base_accuracy(results, task) for task in by_task})
        plots.experts(folder / AGAINST_M, by_task, BASE_EXPERTS)


def base_accuracy(results: Mapping[str, Any], task: str, base: str = "small") -> float:
    name = Run(base, task, BASE).name
    return accuracy(results[name]) if name in results else 0.0


def _base(results: Mapping[str, Any]) -> str:
    return _pretrained(results, "small", SMALL_BASE / "pretraining.json", "one thread of a busy CPU")


def _larger_base(results: Mapping[str, Any]) -> str:
    return _pretrained(results, "larger", LARGER_PRETRAINING)


def _pretrained(results: Mapping[str, Any], base: str, file: Path, where: str = "") -> str:
    """What a base is, and how it was made. where: on a device that the file does not name."""
    if not file.is_file():
        return ""
    told = json.loads(file.read_text(encoding="utf-8"))
    of = {**told, **told["recipe"]}
    one = next((each for each in results.values() if each["base"] == base), None)
    used = f", of which a token activates {one['base_activated'] / 1e6:.1f} million" if one else ""
    return (
        f"{of['parameters'] / 1e6:.1f} million parameters{used}: {of['layers']} layers, hidden size {of['hidden']}, "
        f"{of['experts']} experts of width {of['expert_width']} of which a token uses {of['top_k']}, a vocabulary of "
        f"{of['vocabulary']:,}. Pretrained on {of['tokens'] / 1e6:.1f} million tokens ({of['steps']:,} steps) in "
        f"{of['seconds'] / 60:.0f} minutes on {of.get('device', where)}; training loss at the end "
        f"{of['history'][-1][1]:.2f}."
    )


def _experts(results: Mapping[str, Any]) -> str:
    if not EXPERTS.is_file():
        return ""
    found = json.loads(EXPERTS.read_text(encoding="utf-8"))
    rows = [
        (
            str(number), f"{each['entropy']:.2f}", f"{min(each['use']):.1%} to {max(each['use']):.1%}",
            f"{each['similarity']:.2f}", f"{each['kind_told_by_first_expert']:.2f}",
            ", ".join(f"{kind} {share:.0%}" for kind, share in each["most_used_by_kind"].items()),
        )
        for number, each in enumerate(found["layers"])
    ]  # fmt: skip
    kinds = ", ".join(
        f"{kind} {loss:.2f} and {found['loss_with_moved_experts'][kind]:.2f}" for kind, loss in found["loss"].items()
    )
    table = markdown(
        (
            "layer",
            "entropy of use",
            "use of an expert",
            "similarity",
            "kind of text told",
            "the most used expert takes",
        ),
        rows,
    )
    return f"{table}\n\nLoss as it is, and with every expert in the place of its neighbour: {kinds}."


def _budgets(results: Mapping[str, Any]) -> str:
    found = {cell.budget: [] for task in TASKS for cell in cells(results, "small", task)}
    for budget, listed in found.items():
        known: dict[str, Cell] = {}
        for task in TASKS:
            known |= {cell.method: cell for cell in cells(results, "small", task) if cell.budget == budget}
        listed += [known[method] for method in METHODS if method in known]
    rows = [
        (
            str(budget), METHODS[cell.method].label, str(cell.width), f"{cell.activated:,}", f"{cell.efficiency:.2%}",
            f"{cell.trainable:,}",
        )
        for budget, listed in sorted(found.items())
        for cell in listed
    ]  # fmt: skip
    return markdown(("budget", "method", "rank or bottleneck", "activated", "of the base's", "trainable"), rows)


def _rates(results: Mapping[str, Any]) -> str:
    """Every learning rate that was tried, with its loss on the tune part."""
    tuned: dict[tuple[str, str, int, int, str], dict[float, float]] = {}
    for each in results.values():
        if each["method"] != BASE and each["seed"] == 0:
            key = (each["base"], each["task"], each.get("longer", 1), each["budget"], each["method"])
            tuned.setdefault(key, {})[each["learning_rate"]] = each["tune"]["loss"]
    rates = sorted({rate for found in tuned.values() for rate in found})
    rows = []
    for key in sorted(tuned, key=lambda key: (key[0] != "small", *key[:4], list(METHODS).index(key[4]))):
        found = tuned[key]
        best = min(found.values())
        shown = [f"**{found[rate]:.3f}**" if found.get(rate) == best else f"{found[rate]:.3f}" if rate in found else ""
                 for rate in rates]  # fmt: skip
        rows.append((key[0], key[1], f"{key[2]} x", str(key[3]), METHODS[key[4]].label, *shown))
    return (
        markdown(("base", "task", "steps", "budget", "method", *(f"{rate:g}" for rate in rates)), rows) if rows else ""
    )


def _accuracies(base: str, task: str, longer: int = 1) -> Callable[[Mapping[str, Any]], str]:
    def section(results: Mapping[str, Any]) -> str:
        found = cells(results, base, task, longer)
        if not found:
            return ""
        against = {(each.cell.method, each.cell.budget): each for each in comparisons(found)}
        rows = []
        for cell in found:
            one = against.get((cell.method, cell.budget))
            gain, apart = "", ""
            if one is not None:
                gain = "" if one.gain is None else f"{one.gain:+.1%}" + (f" ± {one.half:.1%}" if one.half else "")
                apart = (one.apart or "they overlap") if one.seeds > 1 else ""
            rows.append(
                (
                    str(cell.budget), METHODS[cell.method].label, _percent(cell.mean, cell.half), str(len(cell.seeds)),
                    gain, apart,
                )
            )  # fmt: skip
        table = markdown(
            ("budget", "method", "accuracy", "seeds", "relative to qvLoRA", "intervals and qvLoRA's"), rows
        )
        return f"The base without an adapter: {base_accuracy(results, task, base):.1%}.\n\n{table}"

    return section


def _percent(mean: float, half: float | None) -> str:
    return f"{mean:.1%}" + ("" if half is None else f" ± {half:.1%}")


def _aim(results: Mapping[str, Any]) -> str:
    """R or E ahead of qvLoRA by 12 % on arithmetic, with intervals that do not overlap."""
    lines = []
    for base in LIKE_LORA:
        for one in comparisons(cells(results, base, "arithmetic")):
            of, gain = METHODS[one.cell.method], one.gain or 0.0
            if of.variant in ("R", "E"):
                met = "met" if gain >= 0.12 and one.apart == "higher" else "not met"
                lines.append(f"- {base} base, budget {one.cell.budget}, {of.label}: {gain:+.1%}, {met}")
    return "\n".join(lines)


def _mistakes(base: str) -> Callable[[Mapping[str, Any]], str]:
    """Where wrong answers go wrong first: the mean over seeds."""

    def section(results: Mapping[str, Any]) -> str:
        kept = json.loads(MISTAKES.read_text(encoding="utf-8")) if MISTAKES.is_file() else {}
        found = [each for name, each in kept.items() if name in results and each.get("base") == base]
        if not found:
            return ""
        rows = []
        for budget in sorted({each["budget"] for each in found}):
            for method, of in METHODS.items():
                ours = [each for each in found if (each["method"], each["budget"]) == (method, budget)]
                if ours:
                    whole = sum(each["problems"] for each in ours)
                    shares = [sum(each["first_mistakes"][kind] for each in ours) / whole for kind in KINDS]
                    facts = sum(each["facts"] for each in ours) / len(ours)
                    told = (*(f"{share:.1%}" for share in shares), f"{facts:.1%}", str(len(ours)))
                    rows.append((str(budget), of.label, *told))
        table = markdown(("budget", "method", *KINDS, "bare calculations right", "seeds"), rows)
        plain = kept[Run(base, "arithmetic", BASE).name]["facts"]
        return f"{table}\n\nThe base without an adapter has {plain:.1%} of the bare calculations right."

    return section


def _missing(results: Mapping[str, Any]) -> str:
    """The runs of the plan that have no result; learning rates that are not chosen yet leave more."""
    left = Counter((run.base, run.task, run.budget, run.longer) for run in _left(results))
    done = sum(each["seconds"] for each in results.values())
    lines = [
        f"- {base}, {task}, "
        + (f"budget {budget}" if budget else "the base alone")
        + (f", {longer} times the steps" if longer > 1 else "")
        + f": {count}"
        for (base, task, budget, longer), count in left.items()
    ]
    told = f"{len(results)} runs are done, which took {done / 3600:.1f} hours together."
    return told + (" Left to do, at least:\n\n" + "\n".join(lines) if lines else " None is left to do.")


def _left(results: Mapping[str, Any]) -> Sequence[Run]:
    return [run for run in {run.name: run for run in planned(results, ORDER)}.values() if run.name not in results]


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "base": _base,
    "experts": _experts,
    "budgets": _budgets,
    "rates": _rates,
    "arithmetic": _accuracies("small", "arithmetic"),
    "kinds": _accuracies("small", "kinds"),
    "larger_base": _larger_base,
    "larger": _accuracies("larger", "arithmetic"),
    "demo": _accuracies("demo", "arithmetic"),
    "longer": _accuracies("small", "arithmetic", LONGER),
    "aim": _aim,
    "mistakes": _mistakes("small"),
    "larger_mistakes": _mistakes("larger"),
    "geometry": lambda results: geometry.told() if GEOMETRY.is_dir() else "",
    "missing": _missing,
}
