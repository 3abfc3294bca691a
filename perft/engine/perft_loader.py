"""Owns loading PERFT adapters by order: through the host cache into the row pool. The key is the digest.

Invariant: both moves run on background threads, so the engine's thread neither reads nor copies.
"""

from adapters.ref import AdapterRef
from perft.engine.host_cache import HostCache, Outcome
from perft.engine.ordered_loading import Movers
from perft.engine.pool import RowPool


class PerftLoader:
    """See `Loader`."""

    def __init__(self, host_cache: HostCache, pool: RowPool, movers: Movers) -> None:
        self._host_cache, self._pool, self._movers = host_cache, pool, movers

    def prepare(self, adapter: AdapterRef) -> Outcome:
        return self._movers["prepare"].start(adapter.key, lambda: self._host_cache.read(adapter.digest, adapter.folder))

    def place(self, adapter: AdapterRef) -> Outcome:
        return self._movers["place"].start(adapter.key, lambda: self._host_cache.place(adapter.digest))

    def evict(self, key: str) -> None:
        self._movers["place"].forget(key)
        self._host_cache.evict(key)

    def drop(self, key: str) -> None:
        self._movers["prepare"].forget(key)
        self._host_cache.drop(key)

    def host_keys(self) -> list[str]:
        return self._host_cache.digests()

    def device_keys(self) -> list[str]:
        return self._pool.digests()
