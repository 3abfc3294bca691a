"""Owns whether one thread or all of them work on a layer: whichever has been quicker for layers of that size.

All threads wait for the last one. Where the processors are free that halves the time on two of them; beside another
busy process it can make it ten times as long. No rule by size or by load knows which, so both are measured as they run.
"""

from dataclasses import dataclass

TRIAL_SHARE = 0.02
"""What finding out may cost: the way that was slower is tried again once this share of the time since pays for it."""


@dataclass
class Measured:
    """Seconds that each way took lately ([alone, together]; None: not tried), and those spent since the last trial."""

    seconds: list[float | None]
    since_trial: float = 0.0


class ThreadChoice:
    """Told how long each layer took; layers are alike if their amounts of work have as many binary digits."""

    def __init__(self) -> None:
        self._by_size: dict[int, Measured] = {}

    def together(self, work: int) -> bool:
        """Whether all threads should work on a layer with `work` multiplications."""
        known = self._by_size.setdefault(work.bit_length(), Measured([None, None]))
        alone, together = known.seconds
        if alone is None or together is None:
            return alone is not None
        slower = max(alone, together)
        is_trial = slower < TRIAL_SHARE * known.since_trial
        return (together < alone) != is_trial

    def took(self, work: int, together: bool, seconds: float) -> None:
        """Remember how long a layer took."""
        known = self._by_size[work.bit_length()]
        before, other = known.seconds[together], known.seconds[not together]
        known.seconds[together] = seconds if before is None else (before + seconds) / 2
        is_slower = other is not None and seconds > other
        known.since_trial = 0.0 if before is None or is_slower else known.since_trial + seconds
