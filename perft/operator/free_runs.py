"""Owns which numbers of 0..n-1 are free, as runs. Invariant: runs that touch are one."""

from collections.abc import Iterable, Iterator


class FreeRuns:
    """A set of free numbers."""

    def __init__(self, count: int) -> None:
        self._runs: list[range] = [range(count)] if count else []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def __iter__(self) -> Iterator[range]:
        return iter(self._runs)

    def take_first(self, count: int) -> int:
        """The lowest `count` free numbers that lie together: their first. Raises LookupError if there are none."""
        for i, run in enumerate(self._runs):
            if len(run) >= count:
                self._shorten(i, count)
                return run.start
        raise LookupError(f"no run of {count} is free")

    def take(self, count: int) -> list[int]:
        """Any `count` free numbers, ascending by run: the smallest run that holds them all, else the largest runs."""
        assert count <= len(self)
        by_size = sorted(range(len(self._runs)), key=lambda i: len(self._runs[i]))
        fitting = next((i for i in by_size if len(self._runs[i]) >= count), None)
        if fitting is not None:
            numbers = list(self._runs[fitting][:count])
            self._shorten(fitting, count)
            return numbers
        numbers = []
        for i in reversed(by_size):
            numbers += self._runs[i][: count - len(numbers)]
            if len(numbers) == count:
                break
        taken = set(numbers)
        self._runs = [part for run in self._runs for part in _without(run, taken)]
        return numbers

    def give(self, numbers: Iterable[int]) -> None:
        """Free numbers that were taken."""
        runs = sorted([*self._runs, *runs_of(numbers)], key=lambda run: run.start)
        merged: list[range] = []
        for run in runs:
            if merged and merged[-1].stop == run.start:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                merged.append(run)
        self._runs = merged

    def _shorten(self, i: int, count: int) -> None:
        rest = self._runs[i][count:]
        self._runs[i : i + 1] = [rest] if rest else []


def runs_of(numbers: Iterable[int]) -> list[range]:
    """Numbers, in the order given, as runs of neighbours."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _without(run: range, taken: set[int]) -> list[range]:
    """What is left of a run whose lowest numbers may have been taken."""
    start = run.start
    while start < run.stop and start in taken:
        start += 1
    return [range(start, run.stop)] if start < run.stop else []
