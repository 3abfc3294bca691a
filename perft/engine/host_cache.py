"""Owns a worker's adapters below the device: host copies, and the threads that move adapters between the tiers.

One thread reads, hashes and packs, another copies to the device, so that a long read delays no copy (see
`perft.threads` for both); the engine's thread only starts a move, asks for its outcome, and frees rows.

Invariant: rows that are being written belong to no plan, because an adapter is placed only once its rows are complete.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adapters.errors import InvalidAdapterError
from adapters.format.config import parse_config
from adapters.format.files import WEIGHTS_FILE, Limits, file_violations
from adapters.format.load import load_layers
from adapters.identity import config_bytes, content_digest, file_hash
from perft.base_model import BaseShape, fit_violations
from perft.engine.pool import PackedAdapter, RowPool, pack
from perft.threads import compute_alone

logger = logging.getLogger(__name__)

READ_WAIT_S, COPY_WAIT_S = 0.001, 0.005
"""How long `start` waits for the move's end: the server asks again only at the step after next, which a quick move
need not wait for. A copy is quick (4 MB: 2 ms), a read is not, unless it is done already."""


class OtherContentsError(ValueError):
    """The files are not the ones that were accepted: they changed after the upload."""


@dataclass(frozen=True)
class Outcome:
    """How a move went. reported: its end was asked for before, or there was no such move."""

    state: Literal["running", "done", "failed", "reported"]
    reason: str | None = None


class Mover:
    """One background thread, and how each of its jobs went. A job keeps its key until its end was reported."""

    def __init__(self, brief_wait_s: float) -> None:
        self._brief_wait_s = brief_wait_s
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = ThreadPoolExecutor(1, "perft-adapters", initializer=_start_thread, initargs=(device,))
        self._jobs: dict[str, Future[None]] = {}

    def start(self, key: str, job: Callable[[], None]) -> Outcome:
        """Queue a job, unless one of that key is under way, and return its state."""
        self.forget(key)
        if key not in self._jobs:
            self._jobs[key] = self._thread.submit(torch.inference_mode()(job))
        return self.outcome(key, self._brief_wait_s)

    def outcome(self, key: str, wait_s: float = 0.0) -> Outcome:
        """The job's state; its end is reported once, after which the key is free."""
        if key not in self._jobs:
            return Outcome("reported")
        if not wait([self._jobs[key]], wait_s).done:
            return Outcome("running")
        error = self._jobs.pop(key).exception()
        if error is None:
            return Outcome("done")
        logger.error("an adapter could not be moved: %r", error)
        return Outcome("failed", _reason(error))

    def running(self) -> list[str]:
        """The keys of the jobs under way."""
        return [key for key, job in self._jobs.items() if not job.done()]

    def forget(self, key: str) -> None:
        """Free the key of a job whose end was never reported: what it did is undone, or done again."""
        if key in self._jobs and self._jobs[key].done():
            del self._jobs[key]


class HostCache:
    """PERFT adapters by digest: on the host (packed), and in the pool's rows.

    What is held and where it came from change together, under a lock: one thread reads while another drops.
    """

    def __init__(self, pool: RowPool, base: BaseShape, limits: Limits) -> None:
        self._pool, self._base, self._limits = pool, base, limits
        self._host: dict[str, PackedAdapter] = {}
        self._placed: set[str] = set()
        self._by_folder: dict[str, str] = {}
        self._folders: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def read(self, digest: str, folder: Path) -> None:
        """Disk to host. A digest that matches proves that the files passed the format check when they were uploaded.

        Raises OtherContentsError if it does not match, InvalidAdapterError if this base cannot serve the adapter.
        """
        if digest in self._host:
            return
        packed = self._packed(digest, folder)
        with self._lock:
            self._host[digest] = packed
            self._by_folder[str(folder)] = digest
            self._folders.setdefault(digest, set()).add(str(folder))

    def _packed(self, digest: str, folder: Path) -> PackedAdapter:
        """The adapter's rows. What depends on the base is checked here: another one may have been served before."""
        if violations := file_violations(folder, self._limits):
            raise InvalidAdapterError("the stored adapter", violations)
        raw = config_bytes(folder)
        found = content_digest(raw, file_hash(folder / WEIGHTS_FILE))
        if found != digest:
            logger.error("the files in %s were changed", folder)  # callers are not told the path
            raise OtherContentsError(f"found digest {found}, expected {digest}: its files were changed")
        config, violations = parse_config(raw)
        if config is None or violations:
            raise InvalidAdapterError("the stored adapter", violations)
        if violations := fit_violations(config, self._base, self._limits.allow_other_base):
            raise InvalidAdapterError("the stored adapter", violations)
        packed = pack(config, load_layers(folder, config, self._base), self._base.output_scale)
        if violations := packed.overflow_violations():
            raise InvalidAdapterError("the stored adapter", violations)
        return packed

    def place(self, digest: str) -> None:
        """Host to device. Raises KeyError if it is not on the host, PoolFullError if there are too few free rows."""
        self._pool.put(digest, self._host[digest])
        with self._lock:
            if self._pool.get(digest) is not None:  # it may have been evicted again
                self._placed.add(digest)

    def evict(self, digest: str) -> None:
        """Free the adapter's rows. No running request may use them."""
        if self._pool.get(digest) is not None:
            self._pool.remove(digest)
        with self._lock:
            self._placed.discard(digest)
            self._forget_unheld(digest)

    def drop(self, digest: str) -> None:
        """Free the host copy."""
        with self._lock:
            self._host.pop(digest, None)
            self._forget_unheld(digest)

    def digest_of(self, folder: str) -> str | None:
        """The digest of a folder that was read through here and is still held, None for any other."""
        return self._by_folder.get(folder)

    def digests(self) -> list[str]:
        """Every adapter on the host, whether or not it is on the device too."""
        with self._lock:
            return list(self._host)

    def holds(self, digest: str) -> bool:
        """Whether it is on the host or was placed from there."""
        return digest in self._host or digest in self._placed

    def _forget_unheld(self, digest: str) -> None:
        if not self.holds(digest):
            for folder in self._folders.pop(digest, ()):
                self._by_folder.pop(folder, None)


def _start_thread(device: int | None) -> None:
    """Set a new thread up to compute alone, and on its maker's accelerator: a thread's own choice is number 0."""
    compute_alone()
    if device is not None:
        torch.accelerator.set_device_index(device)


def _reason(error: BaseException) -> str:
    """What callers are told of a failed move: no path of this machine."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{type(error).__name__}: {words}"
