"""docs/quality.md says what the result files say, and nothing else in numbers."""

import json
import re
from typing import Any

import pytest

from benchmarks.quality import page
from benchmarks.quality.figures import Cell, cells, comparisons, half_interval
from benchmarks.quality.places import LARGER_PRETRAINING, PAGE, RUNS
from benchmarks.quality.runs import STEPS, results

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return results(RUNS)


def test_the_page_is_what_the_result_files_give(found: dict[str, Any]) -> None:
    assert page.filled(TEXT, found) == TEXT, "run: python -m benchmarks.quality page"


def test_every_section_is_on_the_page() -> None:
    assert set(page.SECTION.findall(TEXT) and [name for _, name, _ in page.SECTION.findall(TEXT)]) == set(page.SECTIONS)


def test_no_result_is_typed_by_hand() -> None:
    """But for the level of the intervals."""
    prose = re.sub(r"`[^`]*`", "", page.SECTION.sub("", TEXT)).replace("95 %", "")
    assert not re.findall(r"\d+(?:\.\d+)?\s?%|\d+\.\d+(?!\d*\))", prose)


def test_every_result_is_of_a_run_of_the_grid_on_one_base(found: dict[str, Any]) -> None:
    assert found
    for name, each in found.items():
        assert page.Run(**{field: each[field] for field in page.Run._fields if field in each}).name == name
        assert each["steps"]["steps"] == STEPS[each["base"]].steps * each.get("longer", 1)
    fingerprints = {
        base: {each["base_fingerprint"] for each in found.values() if each["base"] == base} for base in STEPS
    }
    assert {len(each) for each in fingerprints.values()} == {1}
    assert fingerprints["larger"] == {json.loads(LARGER_PRETRAINING.read_text(encoding="utf-8"))["fingerprint"]}


def result(method: str, seed: int, right: int, rate: float = 1e-3, loss: float = 1.0) -> dict[str, Any]:
    return {
        "base": "small", "task": "kinds", "method": method, "budget": 4, "seed": seed, "learning_rate": rate,
        "width": 4, "activated": 100, "base_activated": 1000, "trainable": 100,
        "tune": {"loss": loss}, "test": {"right": right, "examples": 100},
    }  # fmt: skip


def test_an_interval_is_students() -> None:
    """Of 1, 2, 3: the mean is 2, the standard deviation 1, t with two degrees of freedom 4.303."""
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert half_interval([1.0]) is None


def test_only_the_chosen_learning_rate_counts_and_gains_are_by_seed() -> None:
    given = {
        f"small-kinds-{each['method']}-4-lr{each['learning_rate']:g}-seed{each['seed']}": each
        for each in (
            result("qvlora", 0, 40), result("qvlora", 1, 50), result("E", 0, 90, rate=1e-2, loss=2.0),
            result("E", 0, 44), result("E", 1, 55), result("E", 2, 99),
        )
    }  # fmt: skip
    found = cells(given, "small", "kinds")
    assert [(cell.method, cell.rate, cell.accuracies) for cell in found] == [
        ("qvlora", 1e-3, (0.4, 0.5)), ("E", 1e-3, (0.44, 0.55, 0.99)),
    ]  # fmt: skip
    (one,) = comparisons(found)
    assert one.seeds == 2 and one.gain == pytest.approx(0.1) and one.apart is None
    assert one.half == pytest.approx(12.706 * 0.0070711 / 2**0.5 / 0.45, rel=1e-3)


def test_intervals_that_do_not_overlap_are_told() -> None:
    def cell(method: str, *accuracies: float) -> Cell:
        return Cell(method, 4, 4, 1e-3, 1, 0.1, 1, tuple(range(len(accuracies))), accuracies)

    lora = cell("qvlora", 0.50, 0.51, 0.52)
    assert [each.apart for each in comparisons([lora, cell("E", 0.70, 0.71, 0.72)])] == ["higher"]
    assert [each.apart for each in comparisons([lora, cell("E", 0.30, 0.31, 0.32)])] == ["lower"]
    assert [each.apart for each in comparisons([lora, cell("E", 0.51, 0.52, 0.53)])] == [None]
