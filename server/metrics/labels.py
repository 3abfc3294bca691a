"""Owns which adapter names may be a label of /metrics.

Invariant: at most `limit` names hold a label, a name keeps its label until it is released, and asking about a name
that gets none leaves nothing behind.
"""

from collections.abc import Callable

OTHER = "_other"


class AdapterLabels:
    """First come, first served. Not locked: `server.metrics.counters.EventCounters` holds its lock around every call.

    is_known: whether an adapter of that name exists; an unknown one never gets a label. It is called under that
    lock, so it must answer from memory.
    """

    def __init__(self, limit: int, is_known: Callable[[str], bool] | None = None) -> None:
        assert limit >= 0
        self.limit = limit
        self._is_known = is_known
        self._held: set[str] = set()

    def holds(self, name: str) -> bool:
        """Whether the name has a label."""
        return name in self._held

    def take(self, name: str) -> bool:
        """Give the name a label if one is left; whether it got one just now."""
        if name in self._held or len(self._held) >= self.limit:
            return False
        if self._is_known is not None and not self._is_known(name):
            return False
        self._held.add(name)
        return True

    def release(self, name: str) -> bool:
        """Free the name's label; whether it had one."""
        found = name in self._held
        self._held.discard(name)
        return found

    def all_fit(self, names: set[str]) -> bool:
        """Whether all of `names` and all names that hold a label fit at once."""
        return len(self._held | names) <= self.limit
