"""Owns what is asked of the simulated fleet: when requests arrive, for which adapter, how long they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """Requests by arrival (seconds). adapters: numbers; prompts, answers: tokens."""

    arrivals: Floats
    adapters: Sequence[int]
    prompts: Sequence[float]
    answers: Sequence[float]


def zipf(adapters: int, exponent: float = 1.0) -> Floats:
    """The share of each adapter, the most popular first."""
    weights = 1.0 / np.arange(1, adapters + 1) ** exponent
    return np.asarray(weights / weights.sum(), np.float64)


def drawn(random: np.random.Generator, shares_A: Floats, count: int) -> Ints:
    """`count` adapters by their shares."""
    bounds = np.cumsum(shares_A)
    return np.asarray(np.searchsorted(bounds, random.random(count) * bounds[-1], side="right"), np.int64)


def poisson(random: np.random.Generator, rate: float, begin: float, end: float) -> Floats:
    """Arrivals at `rate` per second, in order."""
    count = random.poisson(rate * (end - begin))
    return np.sort(random.uniform(begin, end, count))


def traffic(random: np.random.Generator, arrivals: Floats, adapters: Ints, prompt: int, answer: int) -> Traffic:
    """Requests whose prompts are log-normal (sigma 0.8) and answers exponential, with these means."""
    order = np.argsort(arrivals, kind="stable")
    count = len(arrivals)
    prompts = random.lognormal(np.log(prompt) - 0.32, 0.8, count)
    answers = random.exponential(answer, count)
    return Traffic(arrivals[order], adapters[order].tolist(), prompts.tolist(), answers.tolist())
