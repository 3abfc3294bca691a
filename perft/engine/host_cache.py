"""Owns a worker's adapters below the device: host copies, and the threads that move adapters between the tiers.

One reads, hashes, checks and packs, another copies to the device, so that a long read holds up no copy (both as
`perft.threads` says); the engine's thread only starts a move, asks how it went, and gives rows back. Invariant: rows
that are being written belong to no plan, because an adapter is placed only once its rows are complete.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adapters import Limits, read_folder
from perft.base_model import BaseShape
from perft.engine.pool import PackedAdapter, RowPool, pack
from perft.threads import compute_alone

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
        self.forget(key)
        if key not in self._jobs:
            self._jobs[key] = self._thread.submit(torch.inference_mode()(job))
        return self.outcome(key, self._brief_wait_s)

    def outcome(self, key: str, wait_s: float = 0.0) -> Outcome:
        """How the job stands; its end is told once, after which the key is free."""
        if key not in self._jobs:
            return Outcome("told")
        if not wait([self._jobs[key]], wait_s).done:
            return Outcome("running")
        error = self._jobs.pop(key).exception()
        return Outcome("done") if error is None else Outcome("failed", f"{type(error).__name__}: {error}")

    def forget(self, key: str) -> None:
        """Free the key of a job that ended and whose end was never told: what it did is undone, or done again."""
        if key in self._jobs and self._jobs[key].done():
            del self._jobs[key]


class HostCache:
    """PERFT adapters by digest: on the host (packed), and in the pool's rows.

    What is held and where it came from change together, under a lock: one thread reads, another gives up.
    """

    def __init__(self, pool: RowPool, base: BaseShape, limits: Limits) -> None:
        self._pool, self._base, self._limits = pool, base, limits
        self._host: dict[str, PackedAdapter] = {}
        self._placed: set[str] = set()
        self._by_folder: dict[str, str] = {}
        self._folders: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def read(self, digest: str, folder: Path) -> None:
        """Disk to host. Raises InvalidAdapterError or OtherContentsError."""
        if digest in self._host:
            return
        checked = read_folder(folder, self._base, self._limits)
        if checked.digest != digest:
            raise OtherContentsError(f"found digest {checked.digest}, expected {digest}: the files were changed")
        packed = pack(checked.config, checked.layer_weights(self._base))
        ready = packed.pinned() if self._pool.tensor_RD.is_cuda else packed
        with self._lock:
            self._host[digest] = ready
            self._by_folder[str(folder)] = digest
            self._folders.setdefault(digest, set()).add(str(folder))

    def place(self, digest: str) -> None:
        """Host to device. Raises KeyError if it is not on the host, PoolFullError if its rows are not free."""
        self._pool.put(digest, self._host[digest])
        self._placed.add(digest)

    def evict(self, digest: str) -> None:
        """Free its rows. No request may use them any more."""
        if self._pool.get(digest) is not None:
            self._pool.remove(digest)
        with self._lock:
            self._placed.discard(digest)
            self._forget_unheld(digest)

    def drop(self, digest: str) -> None:
        """Free the host's copy."""
        with self._lock:
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
            for folder in self._folders.pop(digest, ()):
                self._by_folder.pop(folder, None)
