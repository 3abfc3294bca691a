"""Draws what the dashboard's panels found, each where the dashboard has it, nearly as Grafana would."""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from integration.panel_answers import Answered, Series, Span

UNIT_PX, DPI, MARGIN = 34, 100, 0.08
INK, FAINT, PAPER, BOARD = "#d8d9da", "#5a5f66", "#1f1f23", "#111217"
COLORS = {
    "green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2", "yellow": "#fade2a",
    "text": INK,
}  # fmt: skip
PALETTE = (
    "#73bf69", "#fade2a", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d", "#ffb357", "#ca95e5",
    "#c0d8ff", "#e0b400",
)  # fmt: skip
LEGEND_LINES = 6

Box = tuple[float, float, float, float]
"""Left, bottom, width and height, as shares of the figure."""


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it, nearly. Raises KeyError for a unit that the dashboard has not used before."""
    if unit == "s":
        for limit, factor, word in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (60, 1, "s"), (3600, 1 / 60, "min")):
            if abs(value) < limit:
                return f"{_short(value * factor)} {word}" if value else "0 s"
        return f"{_short(value / 3600)} h"
    if unit == "percentunit":
        return f"{_short(100 * value)} %"
    if unit == "bytes":
        for word in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024:
                return f"{_short(value)} {word}"
            value /= 1024
        return f"{_short(value)} TiB"
    if unit.startswith("suffix:"):
        return f"{_short(value)} {unit.removeprefix('suffix:').strip()}"
    return _short(value) + {"short": "", "reqps": " req/s", "ops": " ops/s"}[unit]


def _short(value: float) -> str:
    return f"{value / 1000:.3g}K" if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def draw(answered: Sequence[Answered], span: Span, image: Path) -> None:
    """All panels in one picture, each where the dashboard has it."""
    height = max(each.panel["gridPos"]["y"] + each.panel["gridPos"]["h"] for each in answered)
    figure = Figure(figsize=(24 * UNIT_PX * 2 / DPI, height * UNIT_PX / DPI), dpi=DPI, facecolor=BOARD)
    for each in answered:
        place = each.panel["gridPos"]
        left, width = (place["x"] + MARGIN) / 24, (place["w"] - 2 * MARGIN) / 24
        bottom = 1 - (place["y"] + place["h"] - MARGIN) / height
        box = (left, bottom, width, (place["h"] - 2 * MARGIN) / height)
        if each.panel["type"] == "row":
            figure.text(box[0], box[1] + box[3] / 2, each.title, color=INK, va="center", weight="bold", size=12)
            continue
        figure.patches.append(_paper(figure, box))
        figure.text(
            left + 0.15 / 24, bottom + box[3] - 0.28 / height, each.title, color=INK, size=8.5, va="top", weight="bold"
        )
        DRAWN[each.panel["type"]](figure, each, span, (left, bottom, width, box[3]), height)
    figure.savefig(image)
    with Image.open(image) as drawn:
        drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(image, optimize=True)


def _paper(figure: Figure, box: Box) -> Any:
    return Rectangle(
        box[:2], box[2], box[3], transform=figure.transFigure, facecolor=PAPER, edgecolor="#2c2f34", zorder=-1
    )


def _nothing(figure: Figure, box: Box) -> None:
    figure.text(box[0] + box[2] / 2, box[1] + box[3] / 2, "no data", color=FAINT, ha="center", va="center", size=10)


def _axes(figure: Figure, box: Box, height: int, *, left: float, bottom: float, right: float = 0.2) -> Axes:
    """Inside a panel; the margins are in grid units."""
    top = 1.0
    axes = figure.add_axes((
        box[0] + left / 24, box[1] + bottom / height, box[2] - (left + right) / 24, box[3] - (bottom + top) / height
    ))  # fmt: skip
    axes.set_facecolor(PAPER)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=INK, labelsize=6.5, length=0, pad=2)
    axes.grid(color="#33363b", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


def _times(axes: Axes, span: Span) -> None:
    axes.set_xlim(span.start, span.end)
    ticks = [span.start + (span.end - span.start) * part / 4 for part in range(1, 4)]
    axes.set_xticks(ticks, [time.strftime("%H:%M", time.gmtime(each)) for each in ticks])


def _color(name: str) -> str:
    return COLORS.get(name, name)


def _colors(answered: Answered) -> dict[str, str]:
    fixed = {
        override["matcher"]["options"]: setting["value"]["fixedColor"]
        for override in answered.panel["fieldConfig"]["overrides"]
        for setting in override["properties"]
        if setting["id"] == "color"
    }
    names = sorted({series.name for series in answered.series})
    return {name: _color(fixed.get(name, PALETTE[number % len(PALETTE)])) for number, name in enumerate(names)}


def _threshold(answered: Answered, value: float) -> str:
    steps = answered.panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return _color([step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1])


def _stat(figure: Figure, answered: Answered, span: Span, box: Box, height: int) -> None:
    if not answered.series:
        return _nothing(figure, box)
    (series,) = answered.series
    color, unit = _threshold(answered, series.last), answered.panel["fieldConfig"]["defaults"]["unit"]
    axes = _axes(figure, box, height, left=0, bottom=0, right=0)
    axes.axis("off")
    axes.set_xlim(span.start, span.end)
    times, values = zip(*series.points, strict=True)
    axes.fill_between(times, values, color=color, alpha=0.2, linewidth=0)
    axes.set_ylim(0, 2.2 * max(*values, 1e-9) if len(values) > 1 else 1)
    figure.text(
        box[0] + box[2] / 2, box[1] + box[3] * 0.45, shown(series.last, unit), color=color, ha="center", va="center",
        size=19, weight="bold",
    )  # fmt: skip


def _graph(figure: Figure, answered: Answered, span: Span, box: Box, height: int) -> None:
    if not answered.series:
        return _nothing(figure, box)
    defaults = answered.panel["fieldConfig"]["defaults"]
    custom, unit = defaults["custom"], defaults["unit"]
    series = sorted(answered.series, key=lambda each: -max(value for _, value in each.points))
    legend = min(LEGEND_LINES, len(series))
    axes = _axes(figure, box, height, left=1.15, bottom=0.75 + 0.42 * legend)
    colors, stacking = _colors(answered), custom["stacking"]["mode"]
    if stacking == "none":
        for each in series:
            times, values = _with_gaps(each, span)
            axes.plot(times, values, color=colors[each.name], linewidth=1.1)
    else:
        _stacked(axes, series, span, colors, stacking, custom["drawStyle"])
    axes.set_ylim(0, 1.02 * (defaults.get("max") or (1.0 if stacking == "percent" else axes.dataLim.ymax or 1.0)))
    if custom["thresholdsStyle"]["mode"] != "off":
        _threshold_lines(axes, defaults["thresholds"]["steps"])
    _times(axes, span)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    shown_unit = "percentunit" if stacking == "percent" else unit
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, shown_unit))
    for number, each in enumerate(series[:legend]):
        y = box[1] + (0.32 + 0.42 * (legend - 1 - number)) / height
        more = f"   and {len(series) - legend} more" if number == legend - 1 and len(series) > legend else ""
        figure.text(box[0] + 0.2 / 24, y, "━", color=colors[each.name], size=7, va="center")
        figure.text(box[0] + 0.5 / 24, y, f"{each.name[:48]}{more}", color=INK, size=6.5, va="center")
        highest = max(value for _, value in each.points)
        numbers = f"last {shown(each.last, unit)}   max {shown(highest, unit)}"
        figure.text(box[0] + box[2] - 0.2 / 24, y, numbers, color=INK, size=6.5, va="center", ha="right")


def _with_gaps(series: Series, span: Span) -> tuple[list[float], list[float]]:
    """The points, with a gap where the query found nothing."""
    times: list[float] = []
    values: list[float] = []
    for at, value in series.points:
        if times and at - times[-1] > 1.5 * span.step_s:
            times.append(at)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def _stacked(
    axes: Axes, series: list[Series], span: Span, colors: Mapping[str, str], stacking: str, style: str
) -> None:
    times = sorted({at for each in series for at, _ in each.points})
    rows = [[dict(each.points).get(at, 0.0) for at in times] for each in series]
    if stacking == "percent":
        totals = [sum(column) or 1.0 for column in zip(*rows, strict=True)]
        rows = [[value / total for value, total in zip(row, totals, strict=True)] for row in rows]
    bottom = [0.0] * len(times)
    for each, row in zip(series, rows, strict=True):
        if style == "bars":
            axes.bar(times, row, width=span.step_s, bottom=bottom, color=colors[each.name])
        else:
            above = [low + value for low, value in zip(bottom, row, strict=True)]
            axes.fill_between(times, bottom, above, color=colors[each.name], alpha=0.45, linewidth=0)
            axes.plot(times, above, color=colors[each.name], linewidth=0.8)
        bottom = [low + value for low, value in zip(bottom, row, strict=True)]


def _threshold_lines(axes: Axes, steps: list[dict[str, Any]]) -> None:
    """Those within what is drawn already: a limit far above would flatten the lines."""
    for before, step in pairwise(steps):
        if step["value"] < 3 * axes.get_ylim()[1]:
            is_worse_above = step["color"] != "green"
            axes.axhline(
                step["value"], color=_color(step["color"] if is_worse_above else before["color"]), linestyle="--",
                linewidth=0.9,
            )  # fmt: skip


def _timeline(figure: Figure, answered: Answered, span: Span, box: Box, height: int) -> None:
    if not answered.series:
        return _nothing(figure, box)
    names = sorted({each.name for each in answered.series}, reverse=True)
    axes = _axes(figure, box, height, left=3.2, bottom=0.75)
    mapped = _mapped(answered.panel["fieldConfig"]["defaults"]["mappings"])
    for each in answered.series:
        bars: dict[str, list[tuple[float, float]]] = {}
        for at, value in each.points:
            bars.setdefault(mapped[f"{value:g}"][1], []).append((at, span.step_s * 1.05))
        for color, pieces in bars.items():
            axes.broken_barh(pieces, (names.index(each.name) - 0.38, 0.76), facecolors=_color(color), linewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(False)
    _times(axes, span)
    words = [(text, color) for text, color in mapped.values() if text]
    for number, (text, color) in enumerate(words):
        x = box[0] + box[2] - (0.2 + 1.3 * (len(words) - 1 - number)) / 24
        figure.text(x, box[1] + box[3] - 0.4 / height, text, color=_color(color), size=7, ha="right", va="center")


def _mapped(mappings: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Value -> its text and colour."""
    return {
        value: (shown["text"], shown["color"]) for mapping in mappings for value, shown in mapping["options"].items()
    }


def _table(figure: Figure, answered: Answered, span: Span, box: Box, height: int) -> None:
    """The answers merged by their one label, as Grafana's transformations do it; those without a first column last."""
    if not answered.series:
        return _nothing(figure, box)
    names = answered.panel["transformations"][-1]["options"]["renameByName"]
    columns = {ref: names[f"Value #{ref}"] for ref in answered.found}
    settings: dict[str, dict[str, Any]] = {}
    for override in answered.panel["fieldConfig"]["overrides"]:
        for setting in override["properties"]:
            settings.setdefault(override["matcher"]["options"], {})[setting["id"]] = setting["value"]
    rows: dict[str, dict[str, float]] = {}
    (label,) = {label for each in answered.series for label in each.labels}
    for ref, series in answered.found.items():
        for each in series:
            rows.setdefault(each.labels[label], {})[columns[ref]] = each.last
    first = columns["A"]
    order = sorted(rows, key=lambda name: (-rows[name].get(first, -1.0), name))
    wide = 3.0
    pace = (box[2] * 24 - wide - 0.4) / len(columns)
    most = int((answered.panel["gridPos"]["h"] - 1.9) / 0.55)
    for number, name in enumerate(["", *order[:most]]):
        y = box[1] + box[3] - (1.2 + 0.55 * number) / height
        figure.text(box[0] + 0.2 / 24, y, name or label, color=INK if name else FAINT, size=7.5, va="center")
        for column, title in enumerate(columns.values()):
            text, color = title, FAINT
            if name:
                text, color = _cell(rows[name].get(title), settings.get(title, {}))
            x = box[0] + (wide + pace * (column + 1)) / 24
            figure.text(x, y, text, color=color, size=7.5, va="center", ha="right")


def _cell(value: float | None, settings: Mapping[str, Any]) -> tuple[str, str]:
    if value is None:
        return "", INK
    mapped = _mapped(settings.get("mappings", []))
    if f"{value:g}" in mapped:
        text, color = mapped[f"{value:g}"]
        return text, _color(color)
    return shown(value, settings.get("unit", "short")), INK


DRAWN = {"stat": _stat, "timeseries": _graph, "state-timeline": _timeline, "table": _table}
