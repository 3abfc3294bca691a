"""Owns a worker's adapters below the device: host copies, and the thread that moves adapters between the tiers.

Reading, hashing, checking, packing and copying all happen on that one thread (see `perft.background`); the engine's
thread only starts a move, asks how it went, and gives rows back. Invariant: rows that are being written belong to no
plan, because an adapter is placed only once its rows are complete.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adapters import Limits, read_folder
from perft.background import compute_alone
from perft.base import BaseShape
from perft.engine.pool import PackedAdapter, RowPool, pack

READ_WAIT_S, COPY_WAIT_S = 0.001, 0.005
"""How long starting a move waits for its end: what is quick needs no second question, for which the server would wait
until the step after next. A copy is quick (4 MB: 2 ms), a read is not, unless it is done already."""


class OtherContentsError(ValueError):
    """The files are not those that were accepted: they changed after they were checked."""


@dataclass(frozen=True)
class Outcome:
    """How a move went. told: its end was told before, or there was none."""

    state: Literal["running", "done", "failed", "told"]
    reason: str | None = None


class Mover:
    """One background thread, and how each of its jobs went. A job is known by its key until its end was told."""

    def __init__(self, brief_wait_s: float) -> None:
        self._brief_wait_s = brief_wait_s
        self._thread = ThreadPoolExecutor(1, "perft-adapters", initializer=compute_alone)
        self._jobs: dict[str, Future[None]] = {}

    def start(self, key: str, job: Callable[[], None]) -> Outcome:
        """Queue a job (nothing if one of that key is under way) and tell how it stands."""
        if key not in self._jobs:
            self._jobs[key] = self._thread.submit(torch.inference_mode()(job))
        return self.outcome(key, self._brief_wait_s)

    def outcome(self, key: str, wait_s: float = 0.0) -> Outcome:
        """How the job stands; its end is told once, after which the key is free."""
        if key not in self._jobs:
            return Outcome("told")
        try:
            self._jobs[key].result(wait_s)
        except StillRunning:
            if not self._jobs[key].done():
                return Outcome("running")
            del self._jobs[key]
            return Outcome("failed", "a file took too long to read")
        except Exception as error:
            del self._jobs[key]
            return Outcome("failed", f"{type(error).__name__}: {error}")
        del self._jobs[key]
        return Outcome("done")


class Tiers:
    """PERFT adapters by digest: on the host (packed), and in the pool's rows."""

    def __init__(self, pool: RowPool, base: BaseShape, limits: Limits) -> None:
        self._pool, self._base, self._limits = pool, base, limits
        self._host: dict[str, PackedAdapter] = {}
        self._placed: set[str] = set()
        self._by_folder: dict[str, str] = {}

    def read(self, digest: str, folder: Path) -> None:
        """Disk to host. Raises InvalidAdapterError or OtherContentsError."""
        if digest in self._host:
            return
        checked = read_folder(folder, self._base, self._limits)
        if checked.digest != digest:
            raise OtherContentsError(f"found digest {checked.digest}, expected {digest}: the files were changed")
        packed = pack(checked.config, checked.layer_weights(self._base))
        self._host[digest] = packed.pinned() if self._pool.tensor_RD.is_cuda else packed
        self._by_folder[str(folder)] = digest

    def place(self, digest: str) -> None:
        """Host to device. Raises KeyError if it is not on the host, PoolFullError if its rows are not free."""
        self._pool.put(digest, self._host[digest])
        self._placed.add(digest)

    def evict(self, digest: str) -> None:
        """Free its rows. No request may use them any more."""
        if self._pool.get(digest) is not None:
            self._pool.remove(digest)
        self._placed.discard(digest)
        self._forget_unheld(digest)

    def drop(self, digest: str) -> None:
        """Free the host's copy."""
        self._host.pop(digest, None)
        self._forget_unheld(digest)

    def digest_of(self, folder: str) -> str | None:
        """The digest of a folder that was read through here and is still held, None for any other."""
        return self._by_folder.get(folder)

    def holds(self, digest: str) -> bool:
        """Whether it is on the host or was placed from there."""
        return digest in self._host or digest in self._placed

    def _forget_unheld(self, digest: str) -> None:
        if not self.holds(digest):
            self._by_folder = {folder: known for folder, known in self._by_folder.items() if known != digest}
