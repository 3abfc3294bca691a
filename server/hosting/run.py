"""Owns what became of a server that has a process of its own, for its exit status. Imports little."""

import os
import threading
from dataclasses import dataclass

EXIT_DIED = 70
"""Exit status of a server that ended by itself after its start: an internal error, by sysexits.h."""
LAST_EXIT_S = 20.0
"""Seconds after which a server whose engine died ends without waiting for anything."""


@dataclass
class Run:
    """Whether a server ever served, and what died of its engine."""

    has_started: bool = False
    death: str | None = None

    def engine_died(self, death: str) -> None:
        """Keep what died for the exit status, and see to it that the process ends: the store bears that any time."""
        self.death = death
        last = threading.Timer(LAST_EXIT_S, os._exit, (EXIT_DIED,))
        last.daemon = True
        last.start()
