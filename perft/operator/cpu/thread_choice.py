"""Owns whether one thread or all of them work on a layer: whichever has been quicker for layers of that size.

All threads wait for the last one. Where the processors are free that halves the time on two of them; beside another
busy process it can make it ten times as long. No rule by size or by load knows which, so both are measured as they run.
"""

from dataclasses import dataclass, field

TRIAL_SHARE = 0.02
"""What finding out may cost: the way that was slower is tried again once this share of the time since pays for it."""
FIRST_TRIALS = 3
"""Times that each way is tried before they are compared; the quickest counts, since the first one wakes threads up."""
AT_MOST = 2.0
"""No time counts for more than this many times the usual one: a single interruption changes nothing, a few do."""


@dataclass
class Measured:
    """What is known of layers of one size: seconds and trials of each way ([alone, together]), and the seconds that
    were spent since the slower way was last tried."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    trials: list[int] = field(default_factory=lambda: [0, 0])
    since_trial: float = 0.0


class ThreadChoice:
    """Told how long layers took; they are alike if their amounts of work have as many binary digits."""

    def __init__(self) -> None:
        self._by_size: dict[int, Measured] = {}

    def together(self, work: int) -> bool:
        """Whether all threads should work on layers with `work` multiplications."""
        known = self._by_size.setdefault(work.bit_length(), Measured())
        if min(known.trials) < FIRST_TRIALS:
            return known.trials[True] < known.trials[False]
        alone, together = known.seconds
        is_trial = max(alone, together) < TRIAL_SHARE * known.since_trial
        return (together < alone) != is_trial

    def took(self, work: int, together: bool, seconds: float) -> None:
        """Remember how long a layer took."""
        known = self._by_size[work.bit_length()]
        before, trials = known.seconds[together], known.trials[together]
        if trials < FIRST_TRIALS:
            known.seconds[together] = min(before, seconds) if trials else seconds
        else:
            seconds = min(seconds, AT_MOST * before)
            known.seconds[together] = (before + seconds) / 2
        known.trials[together] += 1
        is_slower = known.seconds[together] > known.seconds[not together]
        known.since_trial = 0.0 if is_slower else known.since_trial + seconds
