"""Owns loading inside a step: what a request needs and no order brought is read on the engine's own thread.

Plain vLLM loads every adapter this way. Under our server adapters are ordered before their requests are admitted, so
nothing should be read here. Invariant: `bytes_read` counts every file that is loaded inside a step.
"""

from pathlib import Path

from adapters.format.files import Limits
from adapters.format.folder import read_folder
from perft.base_model import BaseShape
from perft.engine.host_cache import OtherContentsError
from perft.engine.pool import RowPool, pack


class StepLoader:
    """Reads PERFT folders straight into the row pool; every request of the engine waits meanwhile."""

    def __init__(self, pool: RowPool, base: BaseShape, limits: Limits) -> None:
        self._pool, self._base, self._limits = pool, base, limits
        self.bytes_read = 0

    def load(self, folder: Path, expected: str | None) -> str:
        """Bring a folder to the device and return its digest, which must be `expected` if that is given.

        Raises InvalidAdapterError, OtherContentsError or PoolFullError.
        """
        checked = read_folder(folder, self._base, self._limits)
        self.count(folder)
        if expected not in (None, checked.digest):
            raise OtherContentsError(
                f"found digest {checked.digest}, expected {expected}: the files in {folder} were changed"
            )
        if self._pool.get(checked.digest) is None:
            self._pool.put(
                checked.digest, pack(checked.config, checked.layer_weights(self._base), self._base.output_scale)
            )
        return checked.digest

    def count(self, folder: Path) -> None:
        """Count an adapter's files as read inside a step."""
        self.bytes_read += sum(path.stat().st_size for path in folder.iterdir())
