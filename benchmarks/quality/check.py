"""Owns one tiny cell of the comparison, end to end: pretrain a little, train two methods, evaluate, draw the page.

The numbers mean nothing; nothing outside its folder is written, and nothing is downloaded.
"""

import shutil
from pathlib import Path

from benchmarks.quality import data, wordnet
from benchmarks.quality.base import Recipe, pretrain
from benchmarks.quality.grid import BASE, Run
from benchmarks.quality.page import draw_grid, filled
from benchmarks.quality.places import BUILD, PAGE, ROOT
from benchmarks.quality.runs import Steps, do, results, write

SYNSETS = ROOT / "tests" / "quality" / "wordnet"
"""A few synsets of WordNet, as its files have them."""
RECIPE = Recipe(
    vocabulary=500, hidden=32, layers=2, heads=2, experts=4, expert_width=32, steps=30, batch=8, length=64, warm_up=5,
    decay=10,
)  # fmt: skip
STEPS = Steps(steps=20, batch=8, looks=2)
METHODS = ("qvlora", "R2of4")


def tiny_cell(folder: Path | None = None) -> Path:
    """The folder with a base, the runs, their results, and the page with its pictures."""
    folder = BUILD / "check" if folder is None else folder
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    synsets = wordnet.synsets(SYNSETS)
    pretrain(synsets, RECIPE, base, folder / "pretraining")
    files = data.write("arithmetic", folder / "data", sizes={"train": 200, "tune": 20, "test": 20})
    for method in (BASE, *METHODS):
        budget, rate = (0, 0.0) if method == BASE else (4, 3e-3)
        run = Run("small", "arithmetic", method, budget, rate)
        write(run, do(run, base, files, STEPS, folder / "runs"), folder / "results" / "runs")
    found = results(folder / "results" / "runs")
    (folder / "quality.md").write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw_grid(found, folder)
    print(f"written: {folder}")
    return folder
