"""Owns how a fetch may end, as the process that fetches tells the server."""

from typing import Literal

Outcome = Literal["ok", "missing", "refused", "too_large", "full", "unavailable"]
"""missing: nothing is there. refused: what is there may not be read. full: this machine's disk. unavailable: else."""
