"""One thread or all: the quicker way is taken, also after it changed, and finding out costs little."""

from collections.abc import Callable

import pytest

from perft.operator.cpu.thread_choice import FIRST_TRIALS, TRIAL_SHARE, ThreadChoice

WORK = 1_000_000
Cost = Callable[[bool], float]


def run(choice: ThreadChoice, cost: Cost, layers: int, work: int = WORK) -> tuple[float, int]:
    """Seconds that `layers` layers took, and how many of them were worked on together."""
    total, together = 0.0, 0
    for _ in range(layers):
        many = choice.together(work)
        seconds = cost(many)
        choice.took(work, many, seconds)
        total += seconds
        together += many
    return total, together


@pytest.mark.parametrize("alone, together", [(1.0, 0.5), (0.5, 1.0), (1.0, 20.0), (1.0, 0.05)])
def test_the_quicker_way_is_taken_and_trials_cost_little(alone: float, together: float) -> None:
    total, _ = run(ThreadChoice(), lambda many: together if many else alone, 3000)
    first = FIRST_TRIALS * (alone + together)
    assert total <= 3000 * min(alone, together) * (1 + 1.1 * TRIAL_SHARE) + first


def test_a_change_is_noticed_both_ways() -> None:
    choice = ThreadChoice()
    run(choice, lambda many: 0.5 if many else 1.0, 500)
    run(choice, lambda many: 20.0 if many else 1.0, 5)  # a neighbour comes: a few layers suffer
    _, together = run(choice, lambda many: 20.0 if many else 1.0, 500)
    assert together <= 10
    run(choice, lambda many: 0.5 if many else 1.0, 2000)  # it leaves: the trial that shows it must come
    _, together = run(choice, lambda many: 0.5 if many else 1.0, 200)
    assert together >= 150


def test_sizes_are_judged_apart() -> None:
    choice = ThreadChoice()
    run(choice, lambda many: 2.0 if many else 1.0, 50, work=1000)
    _, together = run(choice, lambda many: 0.5 if many else 1.0, 50, work=10**9)
    assert together >= 45


def test_one_interruption_changes_nothing() -> None:
    choice = ThreadChoice()
    run(choice, lambda many: 0.5 if many else 1.0, 50)
    assert choice.together(WORK)
    choice.took(WORK, True, 40.0)
    assert choice.together(WORK)


def test_the_first_time_together_may_be_slow() -> None:
    """Threads that wake up for the first time take long."""
    choice, costs = ThreadChoice(), iter([30.0] + [0.5] * 1000)
    _, together = run(choice, lambda many: next(costs) if many else 1.0, 100)
    assert together >= 90
